"""Where this process is in its collectives, from torch's flight recorders.

There are two: gloo writes to one, which every build of torch has, and NCCL to another, which builds for CUDA have. A
rank on a GPU uses both backends, so both are read. `TORCH_FR_BUFFER_SIZE`, which `cluster/machine.py` sets, must not
be 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from moray.actors.rank_watch import Waiting

# torch has no public names for them: gloo's first.
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


def position() -> tuple[int, Waiting | None]:
    """(collectives begun in this process, the oldest one that is waited in)."""
    module = torch._C._distributed_c10d
    dumps = [getattr(module, name) for name in _DUMPS if hasattr(module, name)]
    if not dumps:
        raise RuntimeError(f"this torch has none of {', '.join(_DUMPS)}: no hang could be told")
    return position_in(json.loads(dump(True, False)) for dump in dumps)


def position_in(recorders: Iterable[dict[str, Any]]) -> tuple[int, Waiting | None]:
    """`position` from what the recorders dumped; one that recorded nothing has no entries."""
    distinct: list[list[dict[str, Any]]] = []
    for recorder in recorders:
        entries = recorder.get("entries") or []
        if entries and entries not in distinct:  # in some versions of torch both names dump one recorder
            distinct.append(entries)
    begun = sum(max(entry["record_id"] for entry in entries) + 1 for entries in distinct)
    waiting = [entry for entries in distinct for entry in entries if not entry["retired"]]
    if not waiting:
        return begun, None
    oldest = min(waiting, key=lambda entry: entry["time_created_ns"])
    group = oldest["process_group"][1] or oldest["process_group"][0]
    return begun, Waiting(oldest["profiling_name"], group, oldest["collective_seq_id"])
