"""The cost of checkpoints: two ranks over gloo train the tiny model, with and without saves.

Blocks of steps that begin with a save alternate with blocks without one, so that both run under the same machine
conditions. The stall is the time that training is blocked by the copy, and by the previous save if that is still being
written. The total cost is the extra time of a block with a save. It also includes the CPU time that the writer thread
takes from training.

Usage: python benchmarks/checkpoint_stall.py [every=50] [blocks=4] [zero_stage=1]
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness.result import Bar, report

from moray.actors.data.token_set import Batch
from moray.kernels.util.host_memory import keep_freed_memory
from moray.models.presets import preset
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.train_step import train_step
from moray.pipelines.pretrain.worker import Worker, build

WORLD, SEQUENCES, LENGTH = 2, 16, 256


def worker_of(folder: str, zero_stage: int) -> Worker:
    sections = {"parallel": {"zero_stage": zero_stage}, "checkpoint": {"keep": 2}}
    config = PretrainConfig.model_validate({"steps": 10**6, "batch_sequences": SEQUENCES, **sections})
    job = TrainingJob(config, preset("tiny"), LENGTH, folder, "", "pretrain", threads=1)
    device = torch.device("cpu")
    return build(job, Mesh.create(WORLD, device), device)


def block(worker: Worker, first: int, every: int, save: bool) -> float:
    """Seconds of `every` steps, including a save at their beginning if `save` is set."""
    generator = np.random.default_rng(worker.mesh.rank)
    shape = (SEQUENCES // WORLD, LENGTH)
    dist.barrier()
    began = time.monotonic()
    for step in range(first, first + every):
        if save and step == first:
            worker.checkpoints.save(worker.state, step, worker.tokens_before(step))
        ids = generator.integers(0, worker.job.model.vocab_size, shape)
        train_step(worker, Batch(ids, np.zeros(shape, np.int32), np.ones(shape, np.bool_)), step)
    return time.monotonic() - began


def run_rank(rank: int, folder: str, every: int, blocks: int, zero_stage: int, results: Any) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    store = dist.FileStore(f"{folder}/store", WORLD)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    worker = worker_of(folder, zero_stage)
    block(worker, 0, 10, save=True)  # warms up and allocates the memory for copies
    worker.checkpoints.wait()
    worker.checkpoints.ended()
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * blocks):
        save = number % 2 == 0
        times[save].append(block(worker, 10 + number * every, every, save))
        worker.checkpoints.wait()
    saved = [(one.stalled, one.seconds, one.bytes, one.error) for one in worker.checkpoints.ended()]
    results.put((rank, times, saved))
    dist.destroy_process_group()


def main(every: str = "50", blocks: str = "4", zero_stage: str = "1") -> int:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, int(every), int(blocks), int(zero_stage), results)
        ranks = [spawn.Process(target=run_rank, args=(rank, *arguments)) for rank in range(WORLD)]
        for rank in ranks:
            rank.start()
        found = sorted((results.get() for _ in ranks), key=lambda result: result[0])
        for rank in ranks:
            rank.join()
    _, times, saved = found[0]
    assert not any(error for *_, error in saved), saved
    without, with_save = statistics.median(times[False]), statistics.median(times[True])
    stalled = statistics.median(stall for stall, *_ in saved)
    written = statistics.median(seconds for _, seconds, *_ in saved)
    share = stalled / with_save
    cost = (with_save / without - 1) * 100
    rows: list[dict[str, Any]] = [{"steps": int(every), "save": "no", "seconds": without}]
    rows += [{"steps": int(every), "save": "yes", "seconds": with_save, "cost_%": cost}]
    rows[1] |= {"stall_ms": stalled * 1e3, "written_after_s": written, "megabytes": saved[0][2] / 1e6}
    megabytes = saved[0][2] / 1e6
    bars = [
        Bar("stall, % of the time between saves", share * 100, 0.1, "lower"),
        Bar("stall, ms per GB of checkpoint", stalled * 1e3 / (megabytes / 1e3), 200.0, "lower"),
    ]
    return report("checkpoint_stall", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
