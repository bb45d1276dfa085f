"""Training without Ray, for benchmarks: synthetic tokens, the product's training loop in this process, step times."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moray.actors.data.data_worker import DataWorker
from moray.actors.data.held_out import HeldOutPlan
from moray.actors.data.token_set import Batch, TokenVocabulary, write_index, write_token_shard
from moray.kernels.util.host_memory import keep_freed_memory
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.loop import run_training
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.worker import build
from moray.pipelines.tokenize.sequence_packing import TokenDocuments, pack_documents, plan_sequences
from moray.platform.core.events import EventLog, MetricEvent, read_events

VOCABULARY, DOCUMENT = 4096, 600  # number of ids, and tokens per document


def write_tokens(folder: Path, length: int, documents: int = 1000) -> None:
    """Writes documents of evenly spaced ids (a random start and stride each), packed to sequences of `length`."""
    vocabulary = TokenVocabulary(tokenizer="none", size=VOCABULARY, bos=0, eos=1, pad=2)
    generator = np.random.default_rng(1)
    texts = [
        (generator.integers(3, VOCABULARY) + stride * np.arange(DOCUMENT)) % (VOCABULARY - 3) + 3
        for stride in generator.integers(1, 9, documents)
    ]
    tokens = [np.concatenate(([vocabulary.bos], text, [vocabulary.eos])) for text in texts]
    made = TokenDocuments(
        [f"d{number}" for number in range(len(tokens))],
        np.full(len(tokens), 2 * DOCUMENT, np.int64),
        np.concatenate(tokens).astype(np.uint32),
        np.cumsum([0, *map(len, tokens)]),
    )
    packed, pieces = pack_documents(
        made, plan_sequences(np.diff(made.bounds), length, "concatenate"), length, vocabulary
    )
    write_index(folder, [write_token_shard(folder, 0, packed, pieces)], length, vocabulary)


class Reader:
    """A `loop.BatchSource` that reads batches in this process."""

    def __init__(self, job: TrainingJob, tokens: str) -> None:
        self._reader = DataWorker(tokens, {}, job.config.seed, batch_plan(job.config, job.sequence_length))

    def request(self, step: int, start: int, stop: int) -> tuple[int, int, int]:
        return step, start, stop

    def receive(self, handle: Any) -> Batch:
        return self._reader.batch(*handle).unpacked()

    def held_out(self, plan: HeldOutPlan, start: int, stop: int) -> Batch:
        return self._reader.held_out(plan, start, stop).unpacked()


def train_here(job: TrainingJob, tokens: str, device: torch.device) -> None:
    """Trains like `loop.train` on one rank, without Ray. torch.distributed must be initialized."""
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    mesh = Mesh.create(job.config.parallel.expert_parallel, device)
    events = EventLog(Path(job.events), f"train-{mesh.rank}") if mesh.rank == 0 else None
    run_training(build(job, mesh, device), Reader(job, tokens), events)
    dist.destroy_process_group()


def losses_of(folder: Path) -> list[float]:
    """Training losses of every step, from the event log of the run in `folder`."""
    return [event.value for event in _losses(folder)]


def step_seconds(folder: Path, began: float, ended: float) -> float:
    """Mean seconds from one loss to the next, for losses logged between two times in seconds since the epoch.

    Raises ValueError if there are fewer than two losses.
    """
    times = [event.time for event in _losses(folder) if began < event.time < ended]
    if len(times) < 2:
        raise ValueError(f"{len(times)} steps ended within {ended - began:.0f} s: take longer turns")
    return statistics.mean(after - before for before, after in itertools.pairwise(times))


def _losses(folder: Path) -> list[MetricEvent]:
    return [e for e in read_events(folder) if isinstance(e, MetricEvent) and e.name == "train_loss"]
