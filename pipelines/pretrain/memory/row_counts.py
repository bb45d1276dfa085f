"""The rows that ranks send each other in an MoE layer, for a router with random scores.

Shapes: P ranks, L experts of a rank, E experts, T tokens, K slots.
"""

from __future__ import annotations

import math

import torch

from moray.kernels.router import route_reference
from moray.models.config import ModelConfig
from moray.models.expert_parallel.send_plan import SendPlan

_SAMPLE = 4096  # tokens that are routed


def row_counts(config: ModelConfig, ranks: int, tokens: int, imbalance: float) -> torch.Tensor:
    """What a rank learns from the exchange of counts (`models/expert_parallel/exchange.py`): int64 [2, P, L + 1], sent
    and received, pairs by expert and rows.

    Every rank has `tokens` tokens. This rank's experts receive `imbalance` times the mean.
    """
    sampled = min(tokens, _SAMPLE)
    generator = torch.Generator().manual_seed(1)
    ids_TK, _, counts_E = route_reference(
        torch.randn(sampled, config.n_routed_experts, generator=generator),
        torch.zeros(config.n_routed_experts),
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )
    local = config.n_routed_experts // ranks
    rows_P = SendPlan.of(ids_TK, ranks, local).send_counts()
    sent = torch.cat((counts_E.view(ranks, local), rows_P.unsqueeze(1)), dim=1) * tokens // sampled
    rows = math.ceil(rows_P.double().mean().item() / sampled * tokens * imbalance)
    pairs = math.ceil(config.num_experts_per_tok / config.n_routed_experts * tokens * imbalance)
    received = torch.full_like(sent, pairs)
    received[:, -1] = min(rows, tokens)
    return torch.stack((sent, received))
