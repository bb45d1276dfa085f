"""Load balance without an auxiliary loss: the routers' biases counteract the load (DeepSeek-V3 §2.1.2, Wang et al.
2024, "Auxiliary-loss-free load balancing").

Once per optimizer step, the bias of every expert with more than its share of the load decreases by `speed`, and that of
every expert with less increases. One all-reduce sums the counts of all layers.

Shapes: L MoE layers, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.models.model import DeepseekV3


@dataclass(frozen=True)
class RouterUpdate:
    """counts_LE: int64, pairs per expert in the step, over all ranks. max_vio_L: the worst overload of each layer, (max
    - mean) / mean, 0 for a layer that routed nothing."""

    counts_LE: Tensor
    max_vio_L: Tensor


def max_violation(counts_LE: Tensor) -> Tensor:
    """MaxVio per layer: the excess of the most loaded expert over the mean, as a fraction of the mean."""
    mean_L = counts_LE.double().mean(-1)
    over_L = counts_LE.amax(-1) - mean_L
    return torch.where(mean_L > 0, over_L / mean_L, 0.0)


@torch.no_grad()
def update_router_biases(
    model: DeepseekV3, speed: float, reduce: Callable[[Tensor], None] | None = None
) -> RouterUpdate:
    """Changes every bias by speed * sign(mean - count) and resets the counts.

    `reduce` sums an int64 tensor in place over the ranks that route different tokens. It is called once, also with
    speed 0, and not at all for a model without MoE layers.
    """
    counts_LE = model.router_counts()
    if not len(counts_LE):
        return RouterUpdate(counts_LE, torch.zeros(0, dtype=torch.float64))
    if reduce is not None:
        reduce(counts_LE)
    # In integers: a count exactly at the mean must not change its bias.
    step_LE = (counts_LE.sum(-1, keepdim=True) - counts_LE * counts_LE.shape[-1]).sign()
    for router, step_E in zip(model.routers(), step_LE, strict=True):
        router.e_score_correction_bias += speed * step_E
        router.counts_E.zero_()
    return RouterUpdate(counts_LE, max_violation(counts_LE))
