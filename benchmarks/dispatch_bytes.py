"""Bytes between nodes in expert-parallel dispatch and combine, counted on what the ranks send.

32 processes play 4 nodes of 8 ranks. They run one layer's exchange, forward and backward, over gloo, with DeepSeek-V3's
hidden size and routing (256 experts in 8 groups, 8 experts from at most 4 groups). Logits are random, so all experts
are equally likely. Every transfer adds the bytes for ranks of other nodes. The baseline, computed from the same
routing, sends one BF16 hidden state for each expert on another node.

`direct` sends a hidden state once to each rank that holds any of its experts (`models/expert_parallel/routes.py`), `two
hops` once to each node (`two_hop.py`). Forward dispatch is FP8 with scales, expert ids and router weights; combine
returns BF16 sums. Before the count, both routes' results are compared. The exchange of row counts is listed by itself:
its size does not depend on the number of tokens.

Usage: python benchmarks/dispatch_bytes.py [TOKENS_OF_A_RANK=256]
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness.result import Bar, report
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import start_processes

from moray.kernels.router import route
from moray.kernels.util.device import runtime
from moray.models.expert_parallel.all_to_all import AllToAll, PendingRows
from moray.models.expert_parallel.dispatcher import ProcessGroupDispatcher
from moray.models.expert_parallel.stages import Routing
from moray.models.expert_parallel.two_hop import Nodes
from moray.models.presets import preset

NODES, RANKS_OF_NODE = 4, 8
RANKS = NODES * RANKS_OF_NODE
TRANSFERS = ("dispatch", "combine", "backward of combine", "backward of dispatch")


@dataclass(frozen=True)
class CountedAllToAll(AllToAll):
    """Adds up the bytes for ranks of other nodes, by transfer."""

    sent: Counter[str] = field(default_factory=Counter)
    now: list[str] = field(default_factory=lambda: ["counts"])

    def start(self, rows: Tensor, send_counts: Sequence[int] | None, recv_counts: Sequence[int] | None) -> PendingRows:
        ranks = dist.get_process_group_ranks(self.group)
        counts = send_counts if send_counts is not None else [len(rows) // len(ranks)] * len(ranks)
        away = sum(n for n, rank in zip(counts, ranks, strict=True) if rank // RANKS_OF_NODE != node())
        self.sent["counts" if send_counts is None else self.now[0]] += away * rows[:1].nbytes
        return super().start(rows, send_counts, recv_counts)


def node() -> int:
    return dist.get_rank() // RANKS_OF_NODE


def drawn_routing(tokens: int) -> Routing:
    config = preset("v3")
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids_TK, weights_TK, counts_E = route(
        torch.randn(tokens, config.n_routed_experts, generator=generator),
        torch.zeros(config.n_routed_experts),
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
    )
    return Routing(ids_TK, weights_TK, counts_E, None)


def exchange(dispatcher: ProcessGroupDispatcher, now: list[str], rows_TD: Tensor, routing: Routing) -> Tensor:
    """One layer, forward and backward. The experts return their inputs, times the router's weights."""
    rows_TD = rows_TD.clone().requires_grad_()
    now[0] = TRANSFERS[0]
    handle = dispatcher.dispatch(rows_TD, routing, fp8=True)
    handle.start_dispatch()
    rows_RD, weights_R, *_ = handle.wait_dispatch()
    now[0] = TRANSFERS[1]
    handle.start_combine((rows_RD * weights_R.unsqueeze(1)).bfloat16())
    sums_TD = handle.wait_combine()
    rows_RD.register_hook(lambda _: now.__setitem__(0, TRANSFERS[3]))
    now[0] = TRANSFERS[2]
    sums_TD.sum().backward()
    assert int(dispatcher.check.total()) == 0, "other expert ids were received than sent"
    return sums_TD.detach()


def count_bytes(rank: int, store: str, tokens: int, results: Any) -> None:
    """The life of one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    config = preset("v3")
    rows_TD = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(rank)).bfloat16()
    routing = drawn_routing(tokens)
    found, sums = {}, []
    for method in ("direct", "two hops"):
        sent, now = Counter[str](), [""]
        nodes = None
        if method == "two hops":
            first, column = node() * RANKS_OF_NODE, range(rank % RANKS_OF_NODE, RANKS, RANKS_OF_NODE)
            within = dist.new_group(range(first, first + RANKS_OF_NODE), use_local_synchronization=True)
            between = dist.new_group(column, use_local_synchronization=True)
            one, other = (CountedAllToAll(group, sent=sent, now=now) for group in (between, within))
            nodes = Nodes(one, other, runtime(rows_TD.device).queue())
        dispatcher = ProcessGroupDispatcher(dist.group.WORLD, config.n_routed_experts, nodes=nodes)
        dispatcher.all_to_all = CountedAllToAll(dist.group.WORLD, sent=sent, now=now)
        sums.append(exchange(dispatcher, now, rows_TD, routing))
        found[method] = dict(sent)
    experts_of_node = config.n_routed_experts // NODES
    found["naive"] = {"dispatch": int((routing.ids_TK // experts_of_node != node()).sum()) * rows_TD[:1].nbytes}
    difference = (sums[0].float() - sums[1].float()).norm() / sums[0].float().norm()
    results.put((found, difference.item()))
    dist.destroy_process_group()


def main(tokens: str = "256") -> int:
    os.environ |= {"MORAY_KERNELS": "reference", "TORCH_GLOO_LAZY_INIT": "1"}  # no compiling in 32 processes
    results = multiprocessing.get_context("fork").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), int(tokens), results)
        started = start_processes(count_bytes, arguments, RANKS, join=False, start_method="fork")
        found = [results.get() for _ in range(RANKS)]
        started.join()
    totals: dict[str, Counter[str]] = {method: Counter() for method in ("naive", "direct", "two hops")}
    for sent, _ in found:
        for method, total in totals.items():
            total.update(sent[method])
    naive, all_tokens = totals["naive"]["dispatch"], RANKS * int(tokens)
    rows: list[dict[str, Any]] = [
        {"method": method, "transfer": transfer, "bytes_per_token": count / all_tokens, "ratio": count / naive}
        for method, total in totals.items()
        for transfer, count in total.items()
    ]

    def ratio(transfer: str) -> float:
        return totals["two hops"][transfer] / naive

    bars = [
        Bar("two hops: dispatched bytes between nodes over the baseline's", ratio("dispatch"), 0.21, "lower"),
        Bar("two hops: combined bytes between nodes over the baseline's dispatch", ratio("combine"), 0.40, "lower"),
        Bar("relative difference of the two routes' results", max(off for _, off in found), 4e-3, "lower"),
    ]
    return report("dispatch_bytes", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
