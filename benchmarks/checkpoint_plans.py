"""The Python that a save runs in a training process, with the keys of DeepSeek-V3's experts and tiny tensors.

Kernels are launched from the same interpreter, so what a save runs in it delays training. Two parts:

- Saves by four real ranks over gloo. Rank 0 holds what it holds among 1,024 ranks (64 EP x 16 EDP), the others share
  the rest. Measured on rank 0: the processor time of the thread that saves, which is at least the time that it holds
  the interpreter; and of the copy on the training thread.
- The index of 1,024 ranks' listings, made on rank 0.

The peer is `torch.distributed.checkpoint.save` in a thread, as torch's `async_save` runs it. Its saves do not differ.

Usage: python benchmarks/checkpoint_plans.py [ranks=1024] [saves=3], about 10 minutes on two cores
"""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from harness.result import Bar, report
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from moray.models.presets import PRESETS
from moray.models.tensors import parameter_shapes
from moray.pipelines.pretrain.checkpoint.checkpoint_index import StoredPlace, encode_listing, merge_listings
from moray.pipelines.pretrain.checkpoint.checkpoints import Checkpoints
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.optimizer import Fragment

KINDS = [
    "master",
    "ema",
    *(f"{moment}_{part}" for moment in ("exp_avg", "exp_avg_sq") for part in ("fp8", "scale", "power")),
]
EP, WORLD, ELEMENTS = 64, 4, 16
MODULE = "moray.pipelines.pretrain.checkpoint.checkpoint_index"


@cache
def expert_names() -> list[list[str]]:
    """Names of the tensors of each EP rank's experts."""
    config = PRESETS["v3"]
    each = config.n_routed_experts // EP
    by_rank: list[list[str]] = [[] for _ in range(EP)]
    for name in parameter_shapes(config):
        if ".experts." in name:
            by_rank[int(name.split(".experts.")[1].partition(".")[0]) // each].append(name)
    return by_rank


def pieces(rank: int, ranks: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, elements) of each kind that a rank of `ranks` writes: an equal part of its experts."""
    names, copies = expert_names()[rank % EP], ranks // EP
    total = len(names) * ELEMENTS
    begin, end = (rank // EP) * total // copies, (rank // EP + 1) * total // copies
    for at in range(begin // ELEMENTS, -(-end // ELEMENTS)):
        first, last = max(begin, at * ELEMENTS), min(end, (at + 1) * ELEMENTS)
        yield names[at], first - at * ELEMENTS, last - first


class State:
    """The state of one process: that of several of the simulated ranks."""

    def __init__(self, simulated: range, ranks: int) -> None:
        self.model = SimpleNamespace(lm_head=SimpleNamespace(weight=torch.zeros(1)))
        joined: dict[str, list[int]] = {}
        for rank in simulated:
            for name, offset, size in pieces(rank, ranks):
                joined.setdefault(name, []).append(offset)
                joined[name].append(offset + size)
        # One process writes one part of a key. Parts of a key that are not adjacent are the first and last ones here.
        self._fragments = [
            Fragment(kind, name, min(ends), ELEMENTS, torch.zeros(max(ends) - min(ends)))
            for kind in KINDS
            for name, ends in joined.items()
        ]

    def fragments(self, owned: bool = False) -> Iterator[Fragment]:
        yield from self._fragments

    def shared(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "guard/losses", torch.zeros(16)


class Timed(Checkpoints):
    """Records the processor time of each save's thread in seconds."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: list[float] = []

    def _write(self, copy: dict[str, StoredPart], steps: int) -> int:
        began = time.thread_time()
        try:
            return self._save(copy, steps)
        finally:
            self.seconds.append(time.thread_time() - began)

    def _save(self, copy: dict[str, StoredPart], steps: int) -> int:
        return super()._write(copy, steps)


class Peer(Timed):
    """Saves with torch.distributed.checkpoint.save."""

    def _save(self, copy: dict[str, StoredPart], steps: int) -> int:
        self._on_all(self._rank_0_only(lambda: self._folder.prepare(steps)))
        save(dict(copy), storage_writer=self._folder.writer(steps), process_group=self._mesh.io_group)
        by_rank = self._on_all(lambda: self._folder.written(steps, self._mesh.rank))
        files = [entry for files in by_rank for entry in files]
        self._on_all(self._rank_0_only(lambda: self._finish(steps, files)))
        return sum(entry.size for entry in files)


def count_sent() -> list[int]:
    """The bytes of all objects that this process sends to other ranks, in a list of one number."""
    sent, convert = [0], distributed_c10d._object_to_tensor

    def counted(*arguments: Any, **named: Any) -> Any:
        tensor, size = convert(*arguments, **named)
        sent[0] += tensor.numel()
        return tensor, size

    distributed_c10d._object_to_tensor = counted
    return sent


def run_rank(rank: int, kind: str, folder: str, ranks: int, saves: int, results: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    state: Any = State(range(1) if rank == 0 else range(rank, ranks, WORLD - 1), ranks)
    made = (Peer if kind == "torch" else Timed)(Path(folder) / "checkpoints", Mesh.create(1, torch.device("cpu")))
    sent, rows, before = count_sent(), [], 0
    for step in range(1, saves + 1):
        began = time.thread_time()
        made.save(state, step, step)
        copied = time.thread_time() - began
        made.wait()
        (saved,) = made.ended()
        assert not saved.error, saved.error
        rows.append({"thread_s": made.seconds[-1], "copy_ms": copied * 1e3, "save_s": saved.seconds})
        rows[-1] |= {"sent_MB": (sent[0] - before) / 1e6, "megabytes": saved.bytes / 1e6}
        before = sent[0]
        if rank == 0:
            print(f"{kind}: save {step} of {saves}: {rows[-1]}", file=sys.stderr, flush=True)
    memory = [resource.getrusage(who).ru_maxrss / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    results.put((rank, rows, len(list(state.fragments())), memory))
    dist.destroy_process_group()


def save_with(kind: str, ranks: int, saves: int) -> list[dict[str, Any]]:
    """A row for each save: rank 0's figures, and the megabytes that all ranks sent."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=run_rank, args=(rank, kind, folder, ranks, saves, results)) for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
        found = sorted((results.get() for _ in processes), key=lambda one: one[0])
        for process in processes:
            process.join()
    _, rows, tensors, memory = found[0]
    for number, row in enumerate(rows):
        row["sent_MB"] = sum(one[1][number]["sent_MB"] for one in found)
        row |= {"rank_0_GB": memory[0], "child_GB": memory[1]}
    keys, parts = len(KINDS) * sum(map(len, expert_names())), sum(one[2] for one in found)
    sizes = {"keys": keys, "parts": parts, "parts_of_rank_0": tensors}
    return [{"saves": kind, "number": number, **sizes, **row} for number, row in enumerate(rows, 1)]


def parts_of(rank: int, ranks: int) -> dict[str, StoredPart]:
    return {
        f"{kind}/{name}": StoredPart(torch.zeros(size), offset, ELEMENTS)
        for kind in KINDS
        for name, offset, size in pieces(rank, ranks)
    }


def index_here(ranks: int, answer: Any) -> None:
    """The index of all ranks' listings; processor time of the thread that makes it."""
    listings = []
    for rank in range(ranks):
        parts = parts_of(rank, ranks)
        listings.append(
            encode_listing(parts, {key: StoredPlace(f"__{rank}_0.distcp", at, 9) for at, key in enumerate(parts)})
        )
    began, cpu = time.perf_counter(), time.thread_time()
    index = merge_listings(listings)
    row = {"index": "moray", "thread_s": time.thread_time() - cpu, "seconds": time.perf_counter() - began}
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    answer.put({**row, "sent_MB": sum(map(len, listings)) / 1e6, "index_MB": len(index) / 1e6, "child_GB": child})


def index_by_torch(ranks: int, answer: Any) -> None:
    """What rank 0 does of all plans in `torch.distributed.checkpoint.save`, without the results of writing."""
    plans = []
    for rank in range(ranks):
        planner = DefaultSavePlanner()
        planner.set_up_planner(dict(parts_of(rank, ranks)), is_coordinator=rank == 0)
        plans.append(pickle.dumps(planner.create_local_plan()))
    planner = DefaultSavePlanner()
    began, cpu = time.perf_counter(), time.thread_time()
    with tempfile.TemporaryDirectory() as folder:
        merged, metadata = planner.create_global_plan([pickle.loads(plan) for plan in plans])
        for plan in merged:
            pickle.dumps(plan)  # to be scattered
        FileSystemWriter(folder, sync_files=False).finish(metadata, [])
        size = (Path(folder) / ".metadata").stat().st_size
    row = {"index": "torch", "thread_s": time.thread_time() - cpu, "seconds": time.perf_counter() - began}
    answer.put({**row, "sent_MB": sum(map(len, plans)) / 1e6, "index_MB": size / 1e6})


def in_process(job: Any, ranks: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.SimpleQueue()
    child = spawn.Process(target=job, args=(ranks, answer))
    child.start()
    row: dict[str, Any] = answer.get()
    child.join()
    return row


def main(ranks: str = "1024", saves: str = "3") -> int:
    assert threading.active_count() == 1
    rows = [*save_with("moray", int(ranks), int(saves)), *save_with("torch", int(ranks), 1)]
    indexes = [in_process(job, int(ranks)) for job in (index_here, index_by_torch)]
    first, *later = rows[: int(saves)]
    bars = [
        Bar("interpreter of rank 0, s, later saves", max(row["thread_s"] for row in later), 1.0, "lower"),
        Bar("interpreter of rank 0, s, first save", first["thread_s"], 1.0, "lower"),
        Bar("interpreter for the index of all ranks, s", indexes[0]["thread_s"], 1.0, "lower"),
    ]
    return report("checkpoint_plans", [*rows, *indexes], bars, [MODULE])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
