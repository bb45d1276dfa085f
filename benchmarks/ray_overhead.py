"""The overhead of Ray Train on a training step: the same worker function under Ray Train and under torchrun.

Both train the quickstart's model shape on the same tokens with the product's own loop (`pipelines/pretrain/loop.py`).
One configuration has a worker on every core but one, the other a worker on every core. Each worker has one thread.
Under Ray there are also Ray's own processes, the data-loading worker, an actor that delivers batches through the object
store, and the watch for hung ranks. Under torchrun each rank reads its batches itself. The two take turns of some
seconds (`turns.py`). A step time is the time from one loss in the event log to the next. Each turn of Ray Train gives
one ratio: its mean step time over that of the adjacent turn of torchrun. Every step's loss must be the same in both, to
the bit. The bar is undecided if the mean lies within two standard errors of its goal.

The cores kept busy by the workers and by all other processes explain the overhead. With a worker on every core, other
processes take CPU time from a worker, and all workers lose it because they wait for each other.

On a machine with GPUs, a worker on each GPU with a larger model comes last.

Usage: python benchmarks/ray_overhead.py [TURNS=30] [SECONDS=5] [WORKERS | gpus ...]
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.run
from harness.plain_training import VOCABULARY, losses_of, step_seconds, train_here, write_tokens
from harness.result import Bar, report
from harness.turns import Contestant

from moray.cluster.embedded import EmbeddedCluster
from moray.models.config import ModelConfig
from moray.models.presets import preset
from moray.pipelines.pretrain.config import Checkpoint, Parallel, PretrainConfig, TrainingJob
from moray.pipelines.pretrain.trainer import fit
from moray.platform.core.home import Home

SEQUENCES, LENGTH, WARM_UP = 8, 256, 10
CORES = len(os.sched_getaffinity(0))
WAYS = "torchrun", "Ray Train"


def gpu_model() -> ModelConfig:
    """0.2B parameters, 0.17B of them active."""
    return dataclasses.replace(preset("small"), vocab_size=VOCABULARY, num_hidden_layers=2, n_routed_experts=8)


def make_job(folder: Path, workers: int, gpu: bool) -> TrainingJob:
    """A job with more steps than the turns can take. It is killed after the last turn."""
    model, length, precision = (gpu_model(), 2048, "bf16") if gpu else (preset("tiny"), LENGTH, "float32")
    config = PretrainConfig(
        steps=10**6,
        batch_sequences=SEQUENCES * workers,
        precision=precision,
        parallel=Parallel(workers=workers, expert_parallel=workers),
        checkpoint=Checkpoint(every=10**7),
    )
    return TrainingJob(config, model, length, str(folder / "run"), str(folder / "events"), "pretrain", threads=1)


def side_main(way: str, path: str) -> None:
    """Runs one of the two in this process until it is killed."""
    job, tokens, gpu = pickle.loads(Path(path).read_bytes())  # trusted, written by `start`
    if way == "torchrun":
        workers = str(job.config.parallel.workers)
        torch.distributed.run.main(["--standalone", "--nproc-per-node", workers, __file__, "--rank", path])
        return
    topology = EmbeddedCluster(Home.from_environment()).ensure()
    fit(job, tokens, str(Path(path).parent / "train"), topology if gpu else dataclasses.replace(topology, gpus=0))


def rank_main(path: str) -> None:
    job, tokens, gpu = pickle.loads(Path(path).read_bytes())  # trusted, written by `start`
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    train_here(job, tokens, device)


def start(way: str, folder: Path, tokens: Path, workers: int, gpu: bool) -> Contestant:
    """Starts a contestant and runs it until its warm-up steps are done."""
    folder.mkdir()
    job = make_job(folder, workers, gpu)
    (folder / "job").write_bytes(pickle.dumps((job, str(tokens), gpu)))
    side = Contestant([sys.executable, __file__, "--side", way, str(folder / "job")], folder / "log")
    try:
        side.until(lambda: (folder / "events").exists() and len(losses_of(folder)) > WARM_UP)
    except RuntimeError:
        side.end()
        raise
    return side


def compare(root: Path, workers: int, gpu: bool, turns: int, seconds: float) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Result rows and bars from alternating turns of both with `workers` workers."""
    where = f"{workers} {'workers' if workers > 1 else 'worker'} on {'GPUs' if gpu else f'{CORES} cores'}"
    folders = {way: root / f"{way}-{workers}-{gpu}" for way in WAYS}
    sides: dict[str, Contestant] = {}
    try:
        for way, folder in folders.items():
            sides[way] = start(way, folder, root / f"tokens-{make_job(root, 1, gpu).sequence_length}", workers, gpu)
        for number in range(turns):
            for way in WAYS if number % 2 else reversed(WAYS):
                sides[way].turn(seconds)
            print(f"\r{where}: turn {number + 1} of {turns}", end="", file=sys.stderr)
        print(file=sys.stderr)
    finally:
        for side in sides.values():
            side.end()
    means = {way: [step_seconds(folders[way], turn.began, turn.ended) for turn in sides[way].turns] for way in WAYS}
    rows: list[dict[str, Any]] = [
        {
            "workers": where,
            "under": way,
            "step_ms": statistics.mean(means[way]) * 1e3,
            "worker_cores": statistics.mean(sum(turn.cores[:workers]) for turn in sides[way].turns),
            "other_cores": statistics.mean(sum(turn.cores[workers:]) for turn in sides[way].turns),
        }
        for way in WAYS
    ]
    longer = [ray / plain - 1 for plain, ray in zip(*means.values(), strict=True)]
    rows.append({"workers": where, "longer": statistics.mean(longer), "standard_error": standard_error(longer)})
    losses = [losses_of(folder) for folder in folders.values()]
    return rows, [
        Bar(
            f"{where}: overhead of Ray Train on a step", statistics.mean(longer), 0.03, "lower", standard_error(longer)
        ),
        Bar(f"{where}: steps whose losses differ", sum(a != b for a, b in zip(*losses, strict=False)), 0, "lower"),
    ]


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of `values`."""
    return statistics.stdev(values) / len(values) ** 0.5


def main(turns: str = "30", seconds: str = "5", *workers: str) -> int:
    rows, bars = [], []
    gpus = torch.cuda.device_count()
    wanted = workers or (str(CORES - 1), str(CORES), *(["gpus"] if gpus else []))
    counts = [(gpus, True) if count == "gpus" else (int(count), False) for count in wanted]
    with tempfile.TemporaryDirectory(prefix="mry") as path:
        root = Path(path)
        os.environ["MORAY_HOME"] = str(root / "home")
        for length in {make_job(root, 1, gpu).sequence_length for _, gpu in counts}:
            write_tokens(root / f"tokens-{length}" / "numbers", length)
        for count, gpu in counts:
            more_rows, more_bars = compare(root, count, gpu, int(turns), float(seconds))
            rows += more_rows
            bars += more_bars
    return report(f"ray_overhead{'-gpu' if gpus else ''}", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2])
    elif sys.argv[1:2] == ["--side"]:
        side_main(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
