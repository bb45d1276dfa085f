"""What one training worker does: Ray Train starts it on every rank with the same `Job`.

The position is a step count; batch, learning rate and bias speed are functions of it, so going on from a checkpoint
needs nothing but the checkpoint.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from moray.actors.token_set import Batch
from moray.kernels.host_memory import keep_freed_memory
from moray.pipelines.pretrain.anticipation import Anticipation
from moray.pipelines.pretrain.checkpoint import CheckpointFailed
from moray.pipelines.pretrain.config import Job
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.report import Report
from moray.pipelines.pretrain.train_step import drop, measure, take
from moray.pipelines.pretrain.worker import Worker, build
from moray.platform.events import EventLog


class Source(Protocol):
    """Where batches come from."""

    def ask(self, step: int, start: int, stop: int) -> Any:
        """Begins to get slots [start, stop) of a step's global batch."""

    def answer(self, asked: Any) -> Batch:
        """What was asked for."""


class Loaders:
    """DataWorker actors, in turn."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def ask(self, step: int, start: int, stop: int) -> Any:
        return self._actors[step % len(self._actors)].batch.remote(step, start, stop)

    def answer(self, asked: Any) -> Batch:
        import ray

        batch: Batch = ray.get(asked)
        return batch


def train(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: `settings` is {"job": Job, "loaders": [DataWorker handles]}."""
    import ray.train.torch

    job: Job = settings["job"]
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    device = ray.train.torch.get_device()
    worker = build(job, Mesh.create(job.config.expert_parallel, device), device)
    events = EventLog(Path(job.events), f"train-{worker.mesh.rank}") if worker.mesh.rank == 0 else None
    run(worker, Loaders(settings["loaders"]), events)
    if events:
        events.close()


def run(worker: Worker, source: Source, events: EventLog | None) -> None:
    """Trains to the last step, from the newest checkpoint if there is one. `events` is given on rank 0 only.

    Raises CheckpointFailed if the last checkpoint, which is what training is for, cannot be written, and
    FloatingPointError where losses stay bad whatever is left out.
    """
    restored = worker.checkpoints.restore(worker.state)
    report = Report(worker.job, worker.total_tokens, events, restored.tokens)
    report.restored(restored)
    loop = Loop(worker, source, report)
    at = restored.steps
    while at < worker.job.config.steps:
        at = loop.advance(at)
    worker.checkpoints.wait()
    ended = worker.checkpoints.ended()
    report.saved(ended)
    report.archived(worker.checkpoints.archived(last=True))
    if ended and ended[-1].error:
        raise CheckpointFailed(f"the last checkpoint was not written: {ended[-1].error}")


class Loop:
    """Steps one after another, with checkpoints on the way."""

    def __init__(self, worker: Worker, source: Source, report: Report) -> None:
        self._worker, self._source, self._report = worker, source, report
        self._anticipation = Anticipation(worker, self._batch_of)

    def advance(self, first: int) -> int:
        """Trains from step `first` on; where to go on: after the last step, or earlier if training has to go back."""
        worker, checkpoints, steps = self._worker, self._worker.checkpoints, self._worker.job.config.steps
        for step, batch, waited in self._batches(first, steps):
            if not self._attempt(step, batch, waited):
                return self._go_back(step)
            done = step + 1
            if done == steps or done % worker.job.config.checkpoint_every == 0:
                checkpoints.save(worker.state, done, worker.tokens_before(done))
            self._report.saved(checkpoints.ended())
            self._report.archived(checkpoints.archived())
        return steps

    def _attempt(self, step: int, batch: Batch, waited: float) -> bool:
        """Trains on a batch, or skips it. False if the weights turn out to be bad."""
        worker, guard = self._worker, self._worker.state.guard
        if guard.skips(step):
            return True
        tokens = worker.tokens_before(step)
        measured = measure(worker, batch, tokens, self._anticipation.routes(step))
        verdict = guard.judge(step, measured.loss, measured.norm)
        if verdict == "take":
            figures, load_L = take(worker, batch, tokens, measured)
            self._report.add(step + 1, worker.tokens_before(step + 1), figures, load_L, waited)
            return True
        drop(worker)
        if verdict == "skip":
            self._write_down()
            self._report.skipped(guard.history)
        return verdict == "skip"

    def _go_back(self, step: int) -> int:
        """Loads the newest checkpoint from before the step that spoilt the weights; where that is."""
        worker, guard = self._worker, self._worker.state.guard
        guilty = guard.go_back()
        self._write_down()
        self._anticipation.forget()
        worker.checkpoints.wait()
        worker.checkpoints.discard_after(guilty)
        restored = worker.checkpoints.restore(worker.state)
        self._report.went_back(step, guilty, restored.steps, guard.history)
        if not restored.steps:
            raise FloatingPointError(
                f"training has to go back to before step {guilty}, and there is no checkpoint: it begins anew. If it "
                "comes here again, lower schedule.peak or clip"
            )
        return restored.steps

    def _write_down(self) -> None:
        if self._worker.mesh.rank == 0:
            self._worker.state.guard.write(Path(self._worker.job.folder))

    def _ask(self, step: int) -> Any:
        return self._source.ask(step, *self._worker.slots(step))

    def _batch_of(self, step: int) -> Batch:
        return self._source.answer(self._ask(step))

    def _batches(self, first: int, last: int) -> Iterator[tuple[int, Batch, float]]:
        """(step, this rank's batch, seconds waited for it), with the next batches always asked for in advance."""
        prefetch = self._worker.job.config.prefetch
        coming = deque(
            self._ask(step) for step in range(first, first + prefetch)
        )  # past the last step too: any has one
        for step in range(first, last):
            began = time.monotonic()
            batch = self._source.answer(coming.popleft())
            waited = time.monotonic() - began
            coming.append(self._ask(step + prefetch))
            yield step, batch, waited
