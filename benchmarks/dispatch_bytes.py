"""Bytes between nodes in dispatch and combine, counted over simulated routing. Nothing is sent.

DeepSeek-V3's routing (256 experts in 8 groups, 8 experts from at most 4 groups) runs over 4 nodes of 8 ranks, with
random logits, so that all experts are equally likely. The baseline sends one BF16 hidden state per expert.
`models/expert_parallel/exchange.py` dispatches one FP8 hidden state, with scales, expert ids and router weights, to
each rank that holds any of the token's experts. A variant that sends one per node, which the node would forward, is
counted but not implemented. Combine returns one BF16 sum per expert, rank or node.

Usage: python benchmarks/dispatch_bytes.py [tokens=65536]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from harness.result import Bar, report

from moray.kernels.router import route
from moray.kernels.wire import packed_width
from moray.models.presets import preset

NODES, RANKS_PER_NODE = 4, 8
SENT = "dispatch, FP8 per rank"  # the variant of `models/expert_parallel/exchange.py`; the bar uses it


def destinations(ids_TK: torch.Tensor, count: int, experts: int) -> torch.Tensor:
    """bool [T, count]: whether a token is sent to each of `count` equal parts of the experts."""
    sent = torch.zeros(len(ids_TK), count, dtype=torch.bool)
    return sent.scatter_(1, ids_TK // (experts // count), True)


def sends_between_nodes(sent: torch.Tensor, node_T: torch.Tensor, parts_per_node: int) -> float:
    """Sends to other nodes than the token's own, `node_T`, per token."""
    node = torch.arange(sent.shape[1]) // parts_per_node
    return (sent & (node != node_T[:, None])).sum().item() / len(sent)


def main(tokens: str = "65536") -> int:
    config = preset("v3")
    experts, width = config.n_routed_experts, config.hidden_size
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(int(tokens), experts, generator=generator)
    ids_TK, _, _ = route(
        logits_TE,
        torch.zeros(experts),
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
    )
    node_T = torch.arange(int(tokens)) % NODES
    ranks = NODES * RANKS_PER_NODE
    bf16, tail = 2 * width, config.num_experts_per_tok * (torch.int32.itemsize + torch.float32.itemsize)
    fp8 = packed_width(width) + tail
    sends = {
        "expert": sends_between_nodes(destinations(ids_TK, experts, experts), node_T, experts // NODES),
        "rank": sends_between_nodes(destinations(ids_TK, ranks, experts), node_T, RANKS_PER_NODE),
        "node": sends_between_nodes(destinations(ids_TK, NODES, experts), node_T, 1),
    }
    methods = {"dispatch, BF16 per expert": (sends["expert"], bf16)}
    methods |= {f"dispatch, FP8 per {part}": (count, fp8) for part, count in sends.items()}
    methods |= {f"combine, BF16 per {part}": (sends[part], bf16) for part in ("rank", "node")}
    baseline = methods["dispatch, BF16 per expert"][0] * bf16
    rows: list[dict[str, Any]] = [
        {
            "method": method,
            "sends": count,
            "bytes_per_send": size,
            "bytes_per_token": count * size,
            "ratio": count * size / baseline,
        }
        for method, (count, size) in methods.items()
    ]
    nodes = destinations(ids_TK, NODES, experts).sum(1)
    rows.append({"method": "nodes per token", "mean": nodes.float().mean().item(), "max": int(nodes.max())})
    sent = next(row for row in rows if row["method"] == SENT)
    name = "dispatch: bytes between nodes over one BF16 hidden state per expert"
    return report("dispatch_bytes", rows, [Bar(name, sent["ratio"], 0.27, "lower")])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
