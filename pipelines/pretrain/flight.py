"""Where this process is in its collectives, from torch's flight recorder, which gloo and NCCL keep."""

from __future__ import annotations

import json

import torch

from moray.actors.watch import Waiting


def position() -> tuple[int, Waiting | None]:
    """(collectives begun in this process, the oldest one that is waited in)."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json")  # noqa: B009 - torch has no public name for it
    entries = json.loads(dump(True, False)).get("entries", [])
    begun = max((entry["record_id"] + 1 for entry in entries), default=0)
    for entry in entries:
        if not entry["retired"]:
            group = entry["process_group"][1] or entry["process_group"][0]
            return begun, Waiting(entry["profiling_name"], group, entry["collective_seq_id"])
    return begun, None
