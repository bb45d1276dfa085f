"""What one training worker does: Ray Train starts it on every rank with the same `TrainingJob`.

The position is a step count; batch, learning rate and bias speed are functions of it, so going on from a checkpoint
needs nothing but the checkpoint.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moray.actors.data.token_set import Batch
from moray.actors.rank_watch import Beat, Pulse
from moray.kernels.util.host_memory import keep_freed_memory
from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.layout import usable_layout
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.report import Report, Start
from moray.pipelines.pretrain.resilience.flight_recorder import position
from moray.pipelines.pretrain.resilience.preemption import NoNotice, Notice
from moray.pipelines.pretrain.resilience.routing_replay import Anticipation
from moray.pipelines.pretrain.train_step import drop, measure, take
from moray.pipelines.pretrain.worker import Worker, build
from moray.platform.core.events import EventLog


class BatchSource(Protocol):
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


def train_steps(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: `settings` is {"job": TrainingJob, "loaders": [DataWorker handles], "watch":
    Watch}.

    Where Ray has room for fewer workers than were wished for, a smaller layout trains, and ranks too many end at once.
    """
    import ray.train.torch

    job: TrainingJob = settings["job"]
    start = Start()
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    device = ray.train.torch.get_device()
    there = dist.get_world_size()
    world, ep = usable_layout(there, job.config.expert_parallel, batch_plan(job.config, job.sequence_length).sizes)
    if world < there and not Mesh.shrink(world, device):
        return
    mesh = Mesh.create(ep, device)
    start.reached("groups")
    worker = build(job, mesh, device)
    start.reached("model")
    events = EventLog(Path(job.events), f"train-{mesh.rank}") if mesh.rank == 0 else None
    team = mesh.from_first(lambda: secrets.token_hex(4))
    with Pulse(settings["watch"], team, world, mesh.rank, job.config.hang_seconds, lambda: _beat(worker)):
        run_training(worker, Loaders(settings["loaders"]), events, start, Notice())
    if events:
        events.close()


def _beat(worker: Worker) -> Beat:
    begun, waiting = position()
    return Beat(worker.step, begun, waiting, worker.busy)


def run_training(
    worker: Worker,
    source: BatchSource,
    events: EventLog | None,
    start: Start | None = None,
    notice: Notice | None = None,
) -> None:
    """Trains to the last step, from the newest checkpoint if there is one. `events` is given on rank 0 only.

    `start` times what comes before the first step; `notice` tells that machines are to be taken away. Raises
    CheckpointFailed if the last checkpoint, which is what training is for, cannot be written, and FloatingPointError
    where losses stay bad whatever is left out.
    """
    start = start or Start()
    with worker.doing("reading a checkpoint"):
        restored = worker.checkpoints.restore(worker.state)
    start.reached("checkpoint")
    report = Report(worker, events, restored.tokens)
    report.restored(restored)
    loop = Loop(worker, source, report, start, notice or NoNotice())
    at = restored.steps
    while at < worker.job.config.steps:
        at = loop.advance(at)
    if not worker.state.guard.taken(at):
        raise ValueError(f"none of the {at} batches had a token with a next one to learn: nothing was trained")
    with worker.doing("writing a checkpoint"):
        worker.checkpoints.wait()
        ended = worker.checkpoints.ended()
        report.saved(ended)
        report.archived(worker.checkpoints.archived(last=True))
    if ended and ended[-1].error:
        raise CheckpointFailed(f"the last checkpoint was not written: {ended[-1].error}")


class Loop:
    """Steps one after another, with checkpoints on the way."""

    def __init__(self, worker: Worker, source: BatchSource, report: Report, start: Start, notice: NoNotice) -> None:
        self._worker, self._source, self._report, self._start, self._notice = worker, source, report, start, notice
        self._saving = 0.0  # seconds that the last checkpoint took
        self._leaving = False  # a machine is to be taken away, and it is time
        self._anticipation = Anticipation(worker, self._batch_of)

    def advance(self, first: int) -> int:
        """Trains from step `first` on; where to go on: after the last step, or earlier if training has to go back."""
        worker, checkpoints, steps = self._worker, self._worker.checkpoints, self._worker.job.config.steps
        for step, batch, waited in self._batches(first, steps):
            worker.step = step
            if not self._attempt(step, batch, waited):
                return self._go_back(step)
            if step == first:
                self._start.reached("first step")
                self._report.started(self._start)
            done = step + 1
            if self._leaving:
                self._leave(done)
            elif done == steps or done % worker.job.config.checkpoint_every == 0:
                self._save(done)
            ended = checkpoints.ended()
            self._saving = ended[-1].seconds if ended else self._saving
            self._report.saved(ended)
            self._report.archived(checkpoints.archived())
        return steps

    def _save(self, done: int) -> None:
        with self._worker.doing("writing a checkpoint"):
            self._worker.checkpoints.save(self._worker.state, done, self._worker.tokens_before(done))

    def _leave(self, done: int) -> None:
        """Writes a last checkpoint before a machine is taken away, and waits for that: steps after it would be lost."""
        self._save(done)
        with self._worker.doing("waiting for a machine to be taken away"):
            self._worker.checkpoints.wait()
            self._report.note(f"a machine is to be taken away: checkpoint at step {done}", "warning")
            self._notice.wait()
        self._leaving = False

    def _attempt(self, step: int, batch: Batch, waited: float) -> bool:
        """Trains on a batch, or skips it. False if the weights turn out to be bad."""
        worker, guard = self._worker, self._worker.state.guard
        if guard.skips(step):
            return True
        tokens = worker.tokens_before(step)
        near = self._notice.is_near(self._saving)
        measured = measure(worker, batch, tokens, self._anticipation.routes(step), near)
        self._leaving = measured.flags > 0
        if not measured.count:
            return self._leave_out(step)
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

    def _leave_out(self, step: int) -> bool:
        """Goes on past a batch of which no token has a target: documents of one token, and padding."""
        drop(self._worker)
        self._worker.state.guard.leave_out(step)
        self._write_down()
        self._report.empty(step)
        return True

    def _go_back(self, step: int) -> int:
        """Loads the newest checkpoint from before the step that spoilt the weights; where that is."""
        worker, guard = self._worker, self._worker.state.guard
        guilty = guard.go_back()
        self._write_down()
        self._anticipation.forget()
        with worker.doing("going back to a checkpoint"):
            worker.checkpoints.wait()
            worker.checkpoints.discard_after(guilty)
            restored = worker.checkpoints.restore(worker.state)
        self._report.went_back(step, guilty, restored, guard.history)
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
        # Past the last step too: any step has a batch.
        coming = deque(self._ask(step) for step in range(first, first + prefetch))
        for step in range(first, last):
            began = time.monotonic()
            batch = self._source.answer(coming.popleft())
            waited = time.monotonic() - began
            coming.append(self._ask(step + prefetch))
            yield step, batch, waited
