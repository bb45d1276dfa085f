"""What Ray Train costs a training step: the same worker function under Ray Train and under torchrun.

Both train the quickstart's model shape on the same tokens with the product's own loop (`pipelines/pretrain/loop.py`),
a worker on every core, and on every core but one; one thread each. Under Ray there are also Ray's own processes, the
data-loading worker, an actor that batches come from through the object store, and the watch over hanging ranks; under
torchrun each rank reads its batches itself. All these take about a tenth of a core, whatever the workers do: where no
core is left for that, two workers that wait for each other lose all of it. Runs of both alternate; a step takes the
time from one loss in the event log to the next, and a run counts with its median. The losses of both must be the same
to the bit.

Where there are GPUs, a worker on each of them comes last, with a larger model.

Usage: python benchmarks/ray_overhead.py [ROUNDS=4] [STEPS=50] [WORKERS | gpus ...]
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plain_training import VOCABULARY, losses_of, step_seconds, train_here, write_tokens
from result import Bar, report

from moray.cluster.embedded import EmbeddedCluster
from moray.models.config import ModelConfig
from moray.models.presets import preset
from moray.pipelines.pretrain.config import Job, PretrainConfig
from moray.pipelines.pretrain.step import fit
from moray.platform.home import Home

SEQUENCES, LENGTH, WARM_UP = 8, 256, 10
CORES = len(os.sched_getaffinity(0))


def gpu_model() -> ModelConfig:
    """0.2B parameters, 0.17B of them active."""
    return dataclasses.replace(preset("small"), vocab_size=VOCABULARY, num_hidden_layers=2, n_routed_experts=8)


def make_job(folder: Path, workers: int, steps: int, gpu: bool) -> Job:
    model, length, precision = (gpu_model(), 2048, "bf16") if gpu else (preset("tiny"), LENGTH, "float32")
    config = PretrainConfig(
        steps=steps, batch_sequences=SEQUENCES * workers, workers=workers, expert_parallel=workers,
        precision=precision, checkpoint_every=10**6,
    )  # fmt: skip
    return Job(config, model, length, str(folder / "run"), str(folder / "events"), "pretrain", threads=1)


def under_ray(folder: Path, tokens: Path, job: Job, gpu: bool) -> None:
    cluster = EmbeddedCluster(Home.from_environment())
    topology = cluster.ensure()
    try:
        fit(job, str(tokens), folder / "train", topology if gpu else dataclasses.replace(topology, gpus=0))
    finally:
        cluster.stop()


def under_torchrun(folder: Path, tokens: Path, job: Job, gpu: bool) -> None:
    folder.mkdir()
    (folder / "job").write_bytes(pickle.dumps((job, str(tokens), gpu)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(job.config.workers), __file__, "--rank", str(folder / "job")]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def rank_main(path: str) -> None:
    job, tokens, gpu = pickle.loads(Path(path).read_bytes())  # our own file
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    train_here(job, tokens, device)


WAYS = {"torchrun": under_torchrun, "Ray Train": under_ray}


def compare(root: Path, workers: int, gpu: bool, rounds: int, steps: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Alternating runs of both with so many workers."""
    seconds: dict[str, list[float]] = {who: [] for who in WAYS}
    curves = set()
    where = f"{workers} {'workers' if workers > 1 else 'worker'} on {'GPUs' if gpu else f'{CORES} cores'}"
    for number in range(rounds):
        for who, run in WAYS.items():
            folder = root / f"{who}-{workers}-{gpu}-{number}"
            job = make_job(folder, workers, steps, gpu)
            run(folder, root / f"tokens-{job.sequence_length}", job, gpu)
            step = step_seconds(folder, WARM_UP)
            seconds[who].append(step)
            curves.add(tuple(losses_of(folder)))
            print(f"{where} under {who}: {step * 1e3:.1f} ms a step", file=sys.stderr)
    rows: list[dict[str, Any]] = [
        {
            "workers": where, "under": who, "step_ms": statistics.median(of) * 1e3,
            "fastest_ms": min(of) * 1e3, "slowest_ms": max(of) * 1e3,
        }
        for who, of in seconds.items()
    ]  # fmt: skip
    share = statistics.median(one / other for other, one in zip(*seconds.values(), strict=True)) - 1
    return rows, [
        Bar(f"{where}: what a step takes longer under Ray Train", share, 0.03, "lower"),
        Bar(f"{where}: different curves of losses", len(curves), 1, "lower"),
    ]


def main(rounds: str = "4", steps: str = "50", *workers: str) -> int:
    rows, bars = [], []
    gpus = torch.cuda.device_count()
    wanted = workers or (str(CORES - 1), str(CORES), *(["gpus"] if gpus else []))
    counts = [(gpus, True) if count == "gpus" else (int(count), False) for count in wanted]
    with tempfile.TemporaryDirectory(prefix="mry") as path:
        root = Path(path)
        os.environ["MORAY_HOME"] = str(root / "home")
        for length in {make_job(root, count, 1, gpu).sequence_length for count, gpu in counts}:
            write_tokens(root / f"tokens-{length}" / "numbers", length)
        for count, gpu in counts:
            more_rows, more_bars = compare(root, count, gpu, int(rounds), int(steps))
            rows += more_rows
            bars += more_bars
    return report(f"ray_overhead{'-gpu' if gpus else ''}", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2])
    else:
        sys.exit(main(*sys.argv[1:]))
