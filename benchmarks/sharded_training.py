"""Memory and time of training on two ranks, with weights, gradients and masters whole or sharded.

Two gloo ranks with one thread each train one model: whole (zero_stage 0), and with zero_stage 1, 2 and 3. The peak is
that of torch's allocator on rank 0, by its profiler, in the first two steps; it contains copies that gloo makes in
reductions, and NCCL does not. Steps of all layouts then take turns.

Usage: python benchmarks/sharded_training.py [rounds=12]
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from typing import Any

from harness.result import Bar, report

STAGES = (0, 1, 2, 3)
SEQUENCES, LENGTH = 8, 256
MEASURES = ("moray.pipelines.pretrain.train_step", "moray.pipelines.pretrain.worker")  # loaded only by the ranks


def rank_main(rank: int, store: str, rounds: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    from moray.kernels.util.host_memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows: dict[int, dict[str, Any]] = {}
    workers = {}
    for stage in STAGES:
        peak, workers[stage] = _started(stage, rank)
        rows[stage] = {"zero_stage": stage, "peak": peak, "seconds": [], "losses": []}
    for step in range(2, rounds + 2):
        for stage, worker in workers.items():
            dist.barrier()
            began = time.perf_counter()
            loss = _step(worker, step, rank)
            rows[stage]["seconds"].append(time.perf_counter() - began)
            rows[stage]["losses"].append(loss)
    if rank == 0:
        results.put(json.dumps(list(rows.values())))
    dist.destroy_process_group()


def _started(stage: int, rank: int) -> tuple[int, Any]:
    """The peak of the first two steps, and the worker."""
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    from moray.models.presets import preset
    from moray.pipelines.pretrain.config import Parallel, PretrainConfig, TrainingJob, TrainingSchedule
    from moray.pipelines.pretrain.mesh import Mesh
    from moray.pipelines.pretrain.worker import build

    model = dataclasses.replace(preset("tiny"), hidden_size=256, num_hidden_layers=8, num_nextn_predict_layers=1)
    parallel = Parallel(workers=2, expert_parallel=1, micro_batch_sequences=1, zero_stage=stage, recompute="layer")
    schedule = TrainingSchedule(peak=1e-4)  # AdamW's first steps are signs, which rounding flips
    config = PretrainConfig(steps=1000, batch_sequences=SEQUENCES, parallel=parallel, schedule=schedule)
    job = TrainingJob(config, model, LENGTH, tempfile.mkdtemp(), "", "pretrain", threads=1)
    device = torch.device("cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        worker = build(job, Mesh.create(1, device), device)
        for step in range(2):
            _step(worker, step, rank)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max()), worker


def _step(worker: Any, step: int, rank: int) -> float:
    import numpy as np

    from moray.actors.data.token_set import Batch
    from moray.pipelines.pretrain.train_step import train_step

    start, stop = worker.slots(step)
    ids = (np.arange(start, stop)[:, None] * 7 + step + np.arange(LENGTH) * 5) % 4096
    shape = ids.shape
    batch = Batch(ids.astype(np.int64), np.zeros(shape, np.int32), np.ones(shape, np.bool_))
    loss: float = train_step(worker, batch, step)[0]["train_loss"]
    return loss


def main(rounds: str = "12") -> int:
    spawn = multiprocessing.get_context("spawn")
    results, store = spawn.Queue(), tempfile.mktemp()
    ranks = [spawn.Process(target=rank_main, args=(rank, store, int(rounds), results)) for rank in range(2)]
    for one in ranks:
        one.start()
    found = json.loads(results.get())
    for one in ranks:
        one.join()
    whole = found[0]
    rows = [
        {
            "zero_stage": row["zero_stage"],
            "peak_MB": row["peak"] / 1e6,
            "of_whole": row["peak"] / whole["peak"],
            "step_s": statistics.median(row["seconds"]),
            "step_over_whole": statistics.median(
                one / other for one, other in zip(row["seconds"], whole["seconds"], strict=True)
            ),
            "loss": row["losses"][-1],
        }
        for row in found
    ]
    off = max(abs(a / b - 1) for row in found for a, b in zip(row["losses"], whole["losses"], strict=True))
    bars = [
        Bar("peak of zero_stage 3 over that of whole weights", rows[3]["of_whole"], 0.9, "lower"),
        Bar("largest relative difference of a loss", off, 1e-4, "lower"),
    ]
    return report("sharded_training", rows, bars, MEASURES)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
