"""This process's position in its collectives, from torch's flight recorders.

There are two recorders: gloo writes to one, which every build of torch has, and NCCL to another, which CUDA builds
have. A rank on a GPU uses both backends, so both are read. `TORCH_FR_BUFFER_SIZE` must not be 0; `cluster/machine.py`
sets it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from moray.actors.rank_watch import Waiting

# gloo's, then NCCL's; torch has no public names for them.
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


def position() -> tuple[int, Waiting | None]:
    """(collectives started by this process, the oldest one that it still waits in)."""
    module = torch._C._distributed_c10d
    dumps = [getattr(module, name) for name in _DUMPS if hasattr(module, name)]
    if not dumps:
        raise RuntimeError(f"this version of torch has none of {', '.join(_DUMPS)}, so hangs cannot be detected")
    return position_in(json.loads(dump(True, False)) for dump in dumps)


def position_in(recorders: Iterable[dict[str, Any]]) -> tuple[int, Waiting | None]:
    """`position` from the recorders' dumps; the dump of an unused recorder has no entries."""
    distinct: list[list[dict[str, Any]]] = []
    for recorder in recorders:
        entries = recorder.get("entries") or []
        if entries and entries not in distinct:  # in some versions of torch both functions dump the same recorder
            distinct.append(entries)
    begun = sum(max(entry["record_id"] for entry in entries) + 1 for entries in distinct)
    waiting = [entry for entries in distinct for entry in entries if not entry["retired"]]
    if not waiting:
        return begun, None
    oldest = min(waiting, key=lambda entry: entry["time_created_ns"])
    group = oldest["process_group"][1] or oldest["process_group"][0]
    return begun, Waiting(oldest["profiling_name"], group, oldest["collective_seq_id"])
