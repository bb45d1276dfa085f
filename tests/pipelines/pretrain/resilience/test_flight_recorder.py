"""Positions in collectives from torch's flight recorders, gloo's and NCCL's."""

from __future__ import annotations

from typing import Any

from moray.actors.rank_watch import Waiting
from moray.pipelines.pretrain.resilience.flight_recorder import position, position_in


def entry(number: int, kind: str, retired: bool, group: str = "experts") -> dict[str, Any]:
    return {
        "record_id": number,
        "profiling_name": kind,
        "retired": retired,
        "process_group": ["3", group],
        "collective_seq_id": number + 1,
        "time_created_ns": number,
    }


def test_both_recorders_are_read() -> None:
    gloo = {"entries": [entry(0, "gloo:all_gather", True), entry(1, "gloo:all_gather", True)]}
    nccl = {"entries": [entry(7, "nccl:all_to_all", True), entry(8, "nccl:all_reduce", False, "")]}
    assert position_in([gloo, nccl]) == (11, Waiting("nccl:all_reduce", "3", 9))
    assert position_in([gloo]) == (2, None)
    assert position_in([nccl, nccl]) == (9, Waiting("nccl:all_reduce", "3", 9)), "one recorder under two names"
    assert position_in([{}, {"entries": []}]) == (0, None)


def test_the_recorder_of_this_torch_is_read() -> None:
    """Without a process group nothing is recorded."""
    assert position() == (0, None)
