"""The rows that ranks send each other in an MoE layer, for a router with random scores.

Shapes: P ranks, L experts of a rank, E experts, T tokens, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from moray.kernels.router import route_reference
from moray.models.config import ModelConfig
from moray.models.expert_parallel.count_exchange import check_sum
from moray.models.expert_parallel.send_plan import SendPlan

_SAMPLE = 4096  # tokens that are routed


def row_counts(
    config: ModelConfig, ranks: int, node_ranks: int, tokens: int, imbalance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank learns from the exchange of counts: int64 [2, P, X], sent and received, in the columns of
    `models/expert_parallel/routes.py`, or of `two_hop.py` if nodes have more than one rank; and the pairs of each local
    expert, int64 [L].

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
    plan = SendPlan.of(ids_TK, ranks, local)
    pairs = math.ceil(config.num_experts_per_tok / config.n_routed_experts * tokens * imbalance)
    # Sums of expert ids are compared on the device, where they have no values here.
    sent = [counts_E.view(ranks, local) * tokens // sampled, torch.zeros(ranks, 1, dtype=torch.int64)]
    received = [torch.full((ranks, local), pairs), sent[1]]
    for rows_PX in _rows(plan, node_ranks):
        sent.append(rows_PX * tokens // sampled)
        mean = rows_PX.double().mean().item() / sampled * tokens
        received.append(torch.full_like(rows_PX, min(math.ceil(mean * imbalance), tokens)))
    both = torch.stack((torch.cat(sent, dim=1), torch.cat(received, dim=1)))
    return torch.cat((both, check_sum(both)), dim=2), both[1, :, :local].sum(0)


def _rows(plan: SendPlan, node_ranks: int) -> Iterator[torch.Tensor]:
    """The columns that count sampled rows."""
    rows_P1 = plan.send_counts().unsqueeze(1)
    if node_ranks == 1:
        yield rows_P1
        return
    nodes_P1 = plan.grouped(node_ranks).send_counts().repeat_interleave(node_ranks).unsqueeze(1)
    yield nodes_P1
    yield torch.zeros_like(nodes_P1)
    yield rows_P1.view(-1, node_ranks).repeat_interleave(node_ranks, 0)
