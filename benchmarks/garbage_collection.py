"""Training steps with Python's automatic garbage collection, compared with collections at the same steps of all ranks.

Ranks of one machine, a core each, train a small model with expert parallelism over gloo: CPU, so the pauses are a
smaller share of a step than on a GPU, whose steps are as long for a much larger model. Each rank has loaded what a
training worker loads, Ray included, because a full collection visits all objects. Blocks of steps of both kinds
alternate. With `benchmarks/garbage_collection.py 4`, ranks share cores.

Usage: python benchmarks/garbage_collection.py [RANKS=2] [BLOCKS=10] [STEPS=50]
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness.result import Bar, report
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from moray.actors.data.token_set import Batch
from moray.models.presets import preset
from moray.pipelines.pretrain.config import Parallel, PretrainConfig, TrainingJob
from moray.pipelines.pretrain.garbage import collected_by_steps
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.train_step import train_step
from moray.pipelines.pretrain.worker import Worker, build

SEQUENCES, LENGTH = 4, 64
KINDS = ("automatic", "by steps")


def build_worker(ranks: int) -> Worker:
    model = dataclasses.replace(preset("tiny"), num_hidden_layers=6, max_position_embeddings=LENGTH)
    parallel = Parallel(workers=ranks, expert_parallel=ranks, micro_batch_sequences=SEQUENCES // 2)
    config = PretrainConfig(steps=10**6, batch_sequences=SEQUENCES * ranks, parallel=parallel)
    job = TrainingJob(config, model, LENGTH, "unused", "", "pretrain", threads=1)
    cpu = torch.device("cpu")
    return build(job, Mesh.create(ranks, cpu), cpu)


def batch(worker: Worker, step: int) -> Batch:
    shape = (SEQUENCES, LENGTH)
    ids = np.random.default_rng((step, worker.mesh.rank)).integers(0, worker.job.model.vocab_size, shape)
    return Batch(ids, np.zeros(shape, np.int32), np.ones(shape, np.bool_))


class Pauses:
    """Adds up the time of collections."""

    def __init__(self) -> None:
        self.seconds, self.longest, self.count, self._began = 0.0, 0.0, 0, 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            took = time.perf_counter() - self._began
            self.seconds, self.longest, self.count = self.seconds + took, max(self.longest, took), self.count + 1


@contextlib.contextmanager
def collecting(kind: str, steps: int) -> Iterator[Any]:
    if kind == "automatic":
        yield lambda done: None
    else:
        with collected_by_steps(steps) as garbage:
            yield garbage.after


def run_rank(rank: int, ranks: int, store: str, blocks: int, steps: int, results: Any) -> None:
    """The life of one rank: (kind, seconds of a step, pauses of a step, longest pause) of each block."""
    import ray.train.torch

    assert ray.train.torch  # loaded, as in a training worker
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    worker, step, found = build_worker(ranks), 0, []
    for block in range(blocks + 1):
        for kind in KINDS:
            pauses = Pauses()
            with collecting(kind, steps) as after:
                dist.barrier()
                gc.callbacks.append(pauses)
                began = time.perf_counter()
                for done in range(1, steps + 1):
                    train_step(worker, batch(worker, step), step)
                    step += 1
                    after(done)
                seconds = time.perf_counter() - began
                gc.callbacks.remove(pauses)
            if block:  # the first warms up
                found.append((kind, seconds / steps, pauses.seconds / steps, pauses.longest))
    results.put(found)
    dist.destroy_process_group()


def main(ranks: str = "2", blocks: str = "10", steps: str = "50") -> int:
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (int(ranks), str(Path(folder) / "store"), int(blocks), int(steps), results)
        started = spawn(run_rank, arguments, int(ranks), join=False)
        found = [results.get() for _ in range(int(ranks))]
        started.join()
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        own = [row[1:] for blocks_of_rank in found for row in blocks_of_rank if row[0] == kind]
        seconds, pauses, longest = zip(*own, strict=True)
        rows.append(
            {
                "collection": kind,
                "ranks": int(ranks),
                "step_ms": statistics.median(seconds) * 1e3,
                "in_it_collecting_ms": statistics.mean(pauses) * 1e3,
                "longest_collection_ms": max(longest) * 1e3,
            }
        )
    automatic, by_steps = rows
    faster = automatic["step_ms"] / by_steps["step_ms"]
    collecting_share = by_steps["in_it_collecting_ms"] / by_steps["step_ms"]
    bars = [
        Bar("automatic over by steps, step time", faster, 1.0, "higher"),
        Bar("by steps: share of a step spent collecting", collecting_share, 0.005, "lower"),
    ]
    return report("garbage_collection", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
