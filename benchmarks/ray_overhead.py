"""What Ray Train costs a training step: the same worker function under Ray Train and under torchrun.

Both train the quickstart's model shape on the same tokens with the product's own loop (`pipelines/pretrain/loop.py`),
a worker on every core, and on every core but one; one thread each. Under Ray there are also Ray's own processes, the
data-loading worker, an actor that batches come from through the object store, and the watch over hanging ranks; under
torchrun each rank reads its batches itself. All these take about a tenth of a core, whatever the workers do: where no
core is left for that, two workers that wait for each other lose all of it. Runs of both alternate; a step takes the
time from one loss in the event log to the next, and a run counts with its median. The losses of both must be the same
to the bit.

Usage: python benchmarks/ray_overhead.py [rounds=4] [steps=50]
"""

from __future__ import annotations

import itertools
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from result import Bar, report

SEQUENCES, LENGTH, WARM_UP = 8, 256, 10
CORES = len(os.sched_getaffinity(0))


def write_tokens(folder: Path) -> None:
    """Documents that count up."""
    from moray.actors.token_set import Vocabulary, write_index, write_shard
    from moray.pipelines.packing import Documents, pack, plan

    vocabulary = Vocabulary(tokenizer="none", size=4096, bos=0, eos=1, pad=2)
    generator = np.random.default_rng(1)
    texts = [
        (generator.integers(3, 4096) + stride * np.arange(600)) % 4093 + 3 for stride in generator.integers(1, 9, 1000)
    ]
    tokens = [np.concatenate(([vocabulary.bos], text, [vocabulary.eos])) for text in texts]
    documents = Documents(
        [f"d{number}" for number in range(len(tokens))],
        np.full(len(tokens), 1200, np.int64),
        np.concatenate(tokens).astype(np.uint32),
        np.cumsum([0, *map(len, tokens)]),
    )
    packed, pieces = pack(documents, plan(np.diff(documents.bounds), LENGTH, "concatenate"), LENGTH, vocabulary)
    write_index(folder, [write_shard(folder, 0, packed, pieces)], LENGTH, vocabulary)


def make_job(folder: Path, workers: int, steps: int) -> Any:
    from moray.models.presets import preset
    from moray.pipelines.pretrain.config import Job, PretrainConfig

    config = PretrainConfig(
        steps=steps, batch_sequences=SEQUENCES * workers, workers=workers, expert_parallel=workers,
        checkpoint_every=10**6,
    )  # fmt: skip
    return Job(config, preset("tiny"), LENGTH, str(folder / "run"), str(folder / "events"), "pretrain", threads=1)


def under_ray(folder: Path, tokens: Path, workers: int, steps: int) -> None:
    from moray.cluster.embedded import EmbeddedCluster
    from moray.pipelines.pretrain.step import fit
    from moray.platform.home import Home

    cluster = EmbeddedCluster(Home.from_environment())
    topology = cluster.ensure()
    try:
        fit(make_job(folder, workers, steps), str(tokens), folder / "train", topology)
    finally:
        cluster.stop()


def under_torchrun(folder: Path, tokens: Path, workers: int, steps: int) -> None:
    folder.mkdir()
    (folder / "job").write_bytes(pickle.dumps((make_job(folder, workers, steps), str(tokens))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    subprocess.run([*command, __file__, "--rank", str(folder / "job")], check=True, stderr=subprocess.DEVNULL)


def rank_main(path: str) -> None:
    """What `loop.train` does, without Ray."""
    import torch
    import torch.distributed as dist

    from moray.actors.data_worker import DataWorker
    from moray.kernels.host_memory import keep_freed_memory
    from moray.pipelines.pretrain.loop import run
    from moray.pipelines.pretrain.mesh import Mesh
    from moray.pipelines.pretrain.schedule import batch_plan
    from moray.pipelines.pretrain.worker import build
    from moray.platform.events import EventLog

    class Reader:
        """Batches read in this process (`loop.Source`)."""

        def __init__(self) -> None:
            self._reader = DataWorker(tokens, {}, config.seed, batch_plan(config, job.sequence_length))

        def ask(self, step: int, start: int, stop: int) -> tuple[int, int, int]:
            return step, start, stop

        def answer(self, asked: tuple[int, int, int]) -> Any:
            return self._reader.batch(*asked)

    job, tokens = pickle.loads(Path(path).read_bytes())  # our own file
    config = job.config
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    dist.init_process_group("gloo")
    device = torch.device("cpu")
    mesh = Mesh.create(config.expert_parallel, device)
    run(build(job, mesh, device), Reader(), EventLog(Path(job.events), "train-0") if mesh.rank == 0 else None)
    dist.destroy_process_group()


def read_steps(folder: Path) -> tuple[float, list[float]]:
    """The median seconds of a step after the first ones, and all losses."""
    from moray.platform.events import MetricEvent, read_events

    events = [e for e in read_events(folder) if isinstance(e, MetricEvent) and e.name == "train_loss"]
    times = [event.time for event in events][WARM_UP:]
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    return seconds, [event.value for event in events]


WAYS = {"torchrun": under_torchrun, "Ray Train": under_ray}


def compare(root: Path, workers: int, rounds: int, steps: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Alternating runs of both with so many workers."""
    seconds: dict[str, list[float]] = {who: [] for who in WAYS}
    curves = set()
    for number in range(rounds):
        for who, run in WAYS.items():
            folder = root / f"{who}-{workers}-{number}"
            run(folder, root / "tokens", workers, steps)
            step, losses = read_steps(folder)
            seconds[who].append(step)
            curves.add(tuple(losses))
            print(f"{workers} workers under {who}: {step * 1e3:.1f} ms a step", file=sys.stderr)
    rows: list[dict[str, Any]] = [
        {
            "workers": workers, "under": who, "step_ms": statistics.median(of) * 1e3,
            "fastest_ms": min(of) * 1e3, "slowest_ms": max(of) * 1e3,
        }
        for who, of in seconds.items()
    ]  # fmt: skip
    share = statistics.median(one / other for other, one in zip(*seconds.values(), strict=True)) - 1
    where = f"{workers} workers on {CORES} cores"
    return rows, [
        Bar(f"{where}: what a step takes longer under Ray Train", share, 0.03, "lower"),
        Bar(f"{where}: different curves of losses", len(curves), 1, "lower"),
    ]


def main(rounds: str = "4", steps: str = "50") -> int:
    rows, bars = [], []
    with tempfile.TemporaryDirectory(prefix="mry") as path:
        root = Path(path)
        os.environ["MORAY_HOME"] = str(root / "home")
        write_tokens(root / "tokens" / "numbers")
        for workers in (CORES - 1, CORES):
            more_rows, more_bars = compare(root, workers, int(rounds), int(steps))
            rows += more_rows
            bars += more_bars
    return report("ray_overhead", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2])
    else:
        sys.exit(main(*sys.argv[1:]))
