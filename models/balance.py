"""Load balance without an auxiliary loss: the routers' biases move against the load (DeepSeek-V3 §2.1.2, Wang et al.
2024, "Auxiliary-loss-free load balancing").

Once per optimizer step, the bias of every expert that got more than its share falls by `speed`, and that of every
expert that got less rises. All layers' counts travel in one reduction.

Shapes: L MoE layers, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.models.model import DeepseekV3


@dataclass(frozen=True)
class RouterUpdate:
    """counts_LE: int64, pairs per expert in the step, over all ranks. max_vio_L: the worst overload of each layer,
    (max - mean) / mean, 0 for a layer that routed nothing."""

    counts_LE: Tensor
    max_vio_L: Tensor


def max_violation(counts_LE: Tensor) -> Tensor:
    """MaxVio per layer: how far the fullest expert lies above the mean, as a fraction of it."""
    mean_L = counts_LE.double().mean(-1)
    over_L = counts_LE.amax(-1) - mean_L
    return torch.where(mean_L > 0, over_L / mean_L, 0.0)


@torch.no_grad()
def update_router_biases(
    model: DeepseekV3, speed: float, reduce: Callable[[Tensor], None] | None = None
) -> RouterUpdate:
    """Moves every bias by speed * sign(mean - count) and starts the counts anew.

    `reduce` sums an int64 tensor over the ranks that route different tokens, in place. It is called once, also with
    speed 0, and not at all for a model without MoE layers.
    """
    counts_LE = model.router_counts()
    if not len(counts_LE):
        return RouterUpdate(counts_LE, torch.zeros(0, dtype=torch.float64))
    if reduce is not None:
        reduce(counts_LE)
    # In integers: a count at the mean exactly must not move its bias.
    step_LE = (counts_LE.sum(-1, keepdim=True) - counts_LE * counts_LE.shape[-1]).sign()
    for router, step_E in zip(model.routers(), step_LE, strict=True):
        router.e_score_correction_bias += speed * step_E
        router.counts_E.zero_()
    return RouterUpdate(counts_LE, max_violation(counts_LE))
