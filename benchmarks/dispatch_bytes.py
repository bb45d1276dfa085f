"""What crosses between nodes when tokens go to their experts: counted over simulated routing, nothing is sent.

DeepSeek-V3's routing (256 experts in 8 groups, 8 of at most 4 groups) over 4 nodes of 8 ranks; logits are drawn, so
every expert is as likely as another. Against the naive way, a BF16 row for each expert: an FP8 row, with its scales and
the ids and weights of its experts, for each rank that has any of them, which is what
`models/expert_parallel/exchange.py` sends, or for each node, which passes it on. Beside it what comes home: a BF16 row
for each expert, or a rank's, or a node's sum.

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
SENT = "an FP8 row for each rank"  # what `models/expert_parallel/exchange.py` does, and the bar judges


def places(ids_TK: torch.Tensor, count: int, experts: int) -> torch.Tensor:
    """bool [T, count]: which of so many equal parts of the experts a token goes to."""
    goes = torch.zeros(len(ids_TK), count, dtype=torch.bool)
    return goes.scatter_(1, ids_TK // (experts // count), True)


def crossing(goes: torch.Tensor, home_T: torch.Tensor, parts_per_node: int) -> float:
    """Copies that leave a token's node, per token."""
    node = torch.arange(goes.shape[1]) // parts_per_node
    return (goes & (node != home_T[:, None])).sum().item() / len(goes)


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
    home_T = torch.arange(int(tokens)) % NODES
    ranks = NODES * RANKS_PER_NODE
    bf16, tail = 2 * width, config.num_experts_per_tok * (torch.int32.itemsize + torch.float32.itemsize)
    fp8 = packed_width(width) + tail
    copies = {
        "expert": crossing(places(ids_TK, experts, experts), home_T, experts // NODES),
        "rank": crossing(places(ids_TK, ranks, experts), home_T, RANKS_PER_NODE),
        "node": crossing(places(ids_TK, NODES, experts), home_T, 1),
    }
    ways = {"a BF16 row for each expert": (copies["expert"], bf16)}
    ways |= {f"an FP8 row for each {part}": (count, fp8) for part, count in copies.items()}
    ways |= {f"home, a BF16 sum of each {part}": (copies[part], bf16) for part in ("rank", "node")}
    naive = ways["a BF16 row for each expert"][0] * bf16
    rows: list[dict[str, Any]] = [
        {
            "way": way,
            "copies": count,
            "bytes_a_copy": size,
            "bytes_a_token": count * size,
            "ratio": count * size / naive,
        }
        for way, (count, size) in ways.items()
    ]
    nodes = places(ids_TK, NODES, experts).sum(1)
    rows.append({"way": "nodes of a token", "mean": nodes.float().mean().item(), "most": int(nodes.max())})
    sent = next(row for row in rows if row["way"] == SENT)
    return report("dispatch_bytes", rows, [Bar("bytes between nodes, of the naive way", sent["ratio"], 0.27, "lower")])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
