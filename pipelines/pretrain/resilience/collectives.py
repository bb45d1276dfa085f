"""Traces of the collectives that ranks issue, and a check that all ranks issue them in one consistent order.

Ranks deadlock if they wait for each other in two collectives at once. The traces of all ranks show whether that is
possible, even if it did not happen in this run: all ranks of a group must issue the same collectives, and the order of
collectives of different groups must be free of cycles.
"""

from __future__ import annotations

import graphlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_SAME_SIZE = ("allreduce", "broadcast", "reduce_scatter", "allgather", "barrier")


@dataclass(frozen=True)
class Collective:
    """One collective. ranks: of its group. elements: of this rank's input; 0 if ranks may differ in it."""

    operation: str
    ranks: tuple[int, ...]
    elements: int


class CollectiveTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that records the collectives of this thread and of the backward passes that it starts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives.append(_collective(func, args))
        return func(*args, **(kwargs or {}))


def check_order(traces: Sequence[Sequence[Collective]]) -> None:
    """Raises ValueError if the ranks could deadlock. traces: one per rank."""
    issued: dict[tuple[int, ...], dict[int, list[Collective]]] = defaultdict(lambda: defaultdict(list))
    order = graphlib.TopologicalSorter[tuple[tuple[int, ...], int]]()
    for rank, trace in enumerate(traces):
        before = None
        for collective in trace:
            if rank not in collective.ranks:
                raise ValueError(f"rank {rank} issued {collective} but is not in its group")
            event = (collective.ranks, len(issued[collective.ranks][rank]))
            issued[collective.ranks][rank].append(collective)
            order.add(event, *([before] if before else []))
            before = event
    for ranks, by_rank in issued.items():
        _check_group(ranks, by_rank)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        cycle = " before ".join(f"number {number} of ranks {list(ranks)}" for ranks, number in error.args[1])
        raise ValueError(f"collectives have no consistent order: {cycle}") from error


def _check_group(ranks: tuple[int, ...], by_rank: dict[int, list[Collective]]) -> None:
    first = by_rank[ranks[0]]
    for rank in ranks[1:]:
        other = by_rank[rank]
        for number, (one, two) in enumerate(zip(first, other, strict=False)):
            if one != two:
                raise ValueError(
                    f"number {number} of ranks {list(ranks)} is {one.operation} of {one.elements} elements on rank "
                    f"{ranks[0]}, {two.operation} of {two.elements} on rank {rank}"
                )
        if len(first) != len(other):
            raise ValueError(
                f"ranks {list(ranks)}: {len(first)} collectives on rank {ranks[0]}, {len(other)} on {rank}"
            )


def _collective(func: Any, args: Sequence[Any]) -> Collective:
    operation = func.name().partition("::")[2].partition(".")[0].strip("_")
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    same = operation.startswith(_SAME_SIZE)
    return Collective(operation, tuple(dist.get_process_group_ranks(group)), _elements(args[0]) if same else 0)


def _elements(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel()
    return sum(map(_elements, argument)) if isinstance(argument, Sequence) else 0
