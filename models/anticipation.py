"""Routing by choices that were made before: what each router would choose now.

DeepSeek-V4's anticipatory routing (arXiv 2606.19348, 4.2.3) takes the choices of slightly older weights: the `routes`
of `DeepseekV3.training_parts`. The factors of the experts' outputs are the present weights', and so are gradients.

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
    """The experts that every router chooses for these tokens, int64 [B * T, K] each; 0 at padding, where `token_positions_R` tells
    of some. Nothing is counted."""
    _, routings = run_alone(model.routed_parts(ids_BT, targets_BT, document_ids_BT, token_positions_R=token_positions_R))
    return [RoutingContext(token_positions_R).scatter(routing.ids_TK, ids_BT.numel()) for routing in routings]
