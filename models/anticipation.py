"""Anticipatory routing: the experts that the routers of given weights choose.

DeepSeek-V4's anticipatory routing (arXiv 2606.19348, 4.2.3) routes by the choices of slightly older weights: the
`routes` of `DeepseekV3.training_parts`. The factors of the experts' outputs, and the gradients, come from the current
weights.

Shapes: B batch, T tokens, K slots.
"""

import torch
from torch import Tensor

from moray.models.expert_parallel.interleave import run_alone
from moray.models.expert_parallel.stages import RoutingContext
from moray.models.model import DeepseekV3


@torch.no_grad()
def choose_experts(
    model: DeepseekV3,
    ids_BT: Tensor,
    targets_BT: Tensor,
    document_ids_BT: Tensor | None = None,
    token_positions_R: Tensor | None = None,
) -> list[Tensor]:
    """Returns each router's chosen experts for these tokens, int64 [B * T, K]; 0 at padding, if `token_positions_R` is
    given. Does not change the routers' counts."""
    if model.progress is not None:
        model.progress.micro_batches = 1
    parts = model.routed_parts(ids_BT, targets_BT, document_ids_BT, token_positions_R=token_positions_R)
    _, routings = run_alone(parts)
    context = RoutingContext(token_positions_R)
    return [context.scatter(routing.ids_TK, ids_BT.numel()) for routing in routings]
