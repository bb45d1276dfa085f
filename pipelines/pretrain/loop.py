"""The training loop of one worker. Ray Train starts it on every rank with the same `TrainingJob`.

The position in training is a step count. Batch, learning rate and bias speed are functions of it, so a resume needs
only the checkpoint.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moray.actors.data.held_out import HeldOutPlan
from moray.actors.data.token_set import Batch, StoredSequences
from moray.actors.rank_watch import Beat, Pulse
from moray.kernels.util.host_memory import keep_freed_memory
from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.garbage import StepCollector, collected_by_steps
from moray.pipelines.pretrain.held_out_loss import held_out_loss
from moray.pipelines.pretrain.layout import dense_ranks, usable_layout
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.report import Report, StartTimer
from moray.pipelines.pretrain.resilience.flight_recorder import position
from moray.pipelines.pretrain.resilience.preemption import NoPreemption, PreemptionNotice
from moray.pipelines.pretrain.resilience.routing_replay import Anticipation
from moray.pipelines.pretrain.step_profiler import StepProfiler
from moray.pipelines.pretrain.stragglers import BusyTimer
from moray.pipelines.pretrain.train_step import drop, measure, take
from moray.pipelines.pretrain.worker import Worker, assemble, initialize
from moray.platform.core.events import EventLog
from moray.platform.store.paths import any_path
from moray.platform.store.segments import event_log


class BatchSource(Protocol):
    """A source of batches, with asynchronous requests."""

    def request(self, step: int, start: int, stop: int) -> Any:
        """Requests slots [start, stop) of a step's global batch. Returns a handle for `receive`."""

    def receive(self, handle: Any) -> Batch:
        """The requested batch; waits for it."""

    def held_out(self, plan: HeldOutPlan, start: int, stop: int) -> Batch:
        """Slots [start, stop) of the held-out sequences; waits for them."""


class Loaders:
    """DataWorker actors as the BatchSource of one rank. The ranks ask different ones in each step, and take turns."""

    def __init__(self, actors: list[Any], rank: int, world: int) -> None:
        self._actors, self._rank, self._world = actors, rank, world

    def request(self, step: int, start: int, stop: int) -> Any:
        return self._actors[(step * self._world + self._rank) % len(self._actors)].batch.remote(step, start, stop)

    def receive(self, handle: Any) -> Batch:
        import ray

        stored: StoredSequences = ray.get(handle)
        return stored.unpacked()

    def held_out(self, plan: HeldOutPlan, start: int, stop: int) -> Batch:
        return self.receive(self._actors[self._rank % len(self._actors)].held_out.remote(plan, start, stop))


def train_steps(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: `settings` is {"job": TrainingJob, "loaders": [DataWorker handles], "watch":
    RankWatch handle}.

    If Ray started fewer workers than configured, a smaller layout trains, and ranks outside of it return at once.
    """
    import ray.train.torch

    job: TrainingJob = settings["job"]
    start = StartTimer()
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    device = ray.train.torch.get_device()
    started = dist.get_world_size()
    world, ep = usable_layout(started, job.config.parallel.expert_parallel)
    if world < started and not Mesh.shrink(world, device):
        return
    parallel = job.config.parallel
    mesh = Mesh.create(ep, device, dense_ranks(world, parallel.shard_ranks), parallel.node_ranks)
    start.reached("groups")
    worker = assemble(job, mesh, device)
    start.reached("model")
    team = mesh.from_first(lambda: secrets.token_hex(4))
    seconds = job.config.resilience.hang_seconds
    pulse = Pulse(settings["watch"], team, world, mesh.rank, seconds, lambda: _beat(worker))
    log = event_log(any_path(job.events), f"train-{mesh.rank}") if mesh.rank == 0 else contextlib.nullcontext()
    with pulse, log as events:
        run_training(worker, Loaders(settings["loaders"], mesh.rank, world), events, start, PreemptionNotice())


def _beat(worker: Worker) -> Beat:
    begun, waiting = position()
    return Beat(worker.step, begun, waiting, worker.busy)


def run_training(
    worker: Worker,
    source: BatchSource,
    events: EventLog | None,
    start: StartTimer | None = None,
    notice: PreemptionNotice | None = None,
) -> None:
    """Trains to the last step, from the newest checkpoint if there is one, else from the initial weights. `events` is
    given on rank 0 only.

    `start` times the phases before the first step; `notice` reports machines that will be preempted. Raises
    CheckpointFailed if the final checkpoint, the result of training, cannot be written, and FloatingPointError if
    losses stay bad after all allowed rollbacks.
    """
    start = start or StartTimer()
    with worker.doing("reading a checkpoint"):
        restored = worker.checkpoints.restore(worker.state)
        if not restored.steps:
            initialize(worker)
    start.reached("checkpoint")
    report = Report(worker, events, restored.tokens, worker.mesh.to_first(socket.gethostname()))
    report.restored(restored)
    loop = Loop(worker, source, report, start, notice or NoPreemption())
    at = restored.steps
    with collected_by_steps(worker.job.config.parallel.collect_every) as garbage:
        while at < worker.job.config.steps:
            at = loop.advance(at, garbage)
            garbage.now()
    if not worker.state.guard.taken(at):
        raise ValueError(f"nothing was trained: none of the {at} batches has a token with a target")
    with worker.doing("writing a checkpoint"):
        worker.checkpoints.wait()
        ended = worker.checkpoints.ended()
        report.saved(ended)
        report.archived(worker.checkpoints.archived(last=True))
    if ended and ended[-1].error:
        raise CheckpointFailed(f"the last checkpoint was not written: {ended[-1].error}")


class Loop:
    """Runs training steps in order and saves checkpoints."""

    def __init__(
        self, worker: Worker, source: BatchSource, report: Report, start: StartTimer, notice: NoPreemption
    ) -> None:
        self._worker, self._source, self._report, self._start, self._notice = worker, source, report, start, notice
        self._save_seconds = 0.0  # duration of the last save
        self._preempted = False  # a machine will be preempted soon: save now
        self._anticipation = Anticipation(worker, self._batch_of)
        folder = any_path(worker.job.folder)
        self._profiler = StepProfiler(worker.job.config.profile, worker.mesh.rank, worker.device, folder)
        self._busy = BusyTimer(worker.mesh.clock, worker.job.config.resilience.stragglers.every)

    def advance(self, first: int, garbage: StepCollector) -> int:
        """Trains from step `first` to the last step. Returns the step to continue at, which is earlier after a
        rollback."""
        worker, checkpoints, steps = self._worker, self._worker.checkpoints, self._worker.job.config.steps
        for step, batch, waited in self._batches(first, steps):
            worker.step = step
            self._profiler.before(step + 1)
            with self._profiler.watching(), self._busy.step(waited):
                taken = self._attempt(step, batch, waited)
            if not taken:
                return self._roll_back(step)
            if step == first:
                self._start.reached("first step")
                self._report.started(self._start)
            done = step + 1
            garbage.after(done)
            self._report.profiled(self._profiler.after(done))
            self._evaluate(done)
            if self._preempted:
                self._save_before_preemption(done)
            elif done == steps or done % worker.job.config.checkpoint.every == 0:
                self._save(done)
            ended = checkpoints.ended()
            self._save_seconds = ended[-1].seconds if ended else self._save_seconds
            self._report.saved(ended)
            self._report.archived(checkpoints.archived())
        return steps

    def _evaluate(self, done: int) -> None:
        """Measures the loss on held-out tokens, if it is due after this step."""
        worker, every = self._worker, self._worker.job.config.evaluate_every
        plan = worker.job.held_out
        if every is None or plan is None or (done % every and done != worker.job.config.steps):
            return
        began = time.monotonic()
        with worker.doing("measuring the held-out loss"):
            found = held_out_loss(worker, plan, partial(self._source.held_out, plan))
        self._report.held_out(done, found, time.monotonic() - began)

    def _save(self, done: int) -> None:
        with self._worker.doing("writing a checkpoint"):
            self._worker.checkpoints.save(self._worker.state, done, self._worker.tokens_before(done))

    def _save_before_preemption(self, done: int) -> None:
        """Writes a checkpoint, then waits for the preemption, because any step after the checkpoint would be lost."""
        self._save(done)
        with self._worker.doing("waiting for a machine to be preempted"):
            self._worker.checkpoints.wait()
            self._report.note(f"a machine will be preempted: checkpoint at step {done}", "warning")
            self._notice.wait()
        self._preempted = False

    def _attempt(self, step: int, batch: Batch, waited: float) -> bool:
        """Trains on a batch, or skips it. Returns False if the weights are bad and training must roll back."""
        worker, guard = self._worker, self._worker.state.guard
        if guard.skips(step):
            return True
        due = self._notice.is_due(self._save_seconds)
        routes, busy = self._anticipation.routes(step), self._busy.due(step)
        measured = measure(worker, batch, step, routes, due, busy)
        self._preempted = measured.flags > 0
        self._report.compared(step + 1, measured.busy_R)
        if not measured.count:
            return self._skip_empty(step)
        decision = guard.decide(step, measured.loss, measured.norm)
        if decision == "take":
            metrics, load_L = take(worker, step, measured)
            self._report.count_sources(measured.sources)
            self._report.add(step + 1, worker.tokens_before(step + 1), metrics, load_L, waited)
            return True
        drop(worker)
        if decision == "skip":
            self._write_record()
            self._report.skipped(guard.history)
        return decision == "skip"

    def _skip_empty(self, step: int) -> bool:
        """Skips a batch without any target, which has only one-token documents and padding."""
        drop(self._worker)
        self._worker.state.guard.record_empty(step)
        self._write_record()
        self._report.empty(step)
        return True

    def _roll_back(self, step: int) -> int:
        """Loads the newest checkpoint from before the step whose batch damaged the weights. Returns its step."""
        worker, guard = self._worker, self._worker.state.guard
        culprit = guard.roll_back()
        self._write_record()
        self._anticipation.clear()
        with worker.doing("rolling back to a checkpoint"):
            worker.checkpoints.wait()
            worker.checkpoints.discard_after(culprit)
            restored = worker.checkpoints.restore(worker.state)
        self._report.rolled_back(step, culprit, restored, guard.history)
        if not restored.steps:
            raise FloatingPointError(
                f"training must roll back to before step {culprit}, and there is no checkpoint: it restarts from the "
                "beginning. If this happens again, lower schedule.peak or clip"
            )
        return restored.steps

    def _write_record(self) -> None:
        if self._worker.mesh.rank == 0:
            self._worker.state.guard.write(any_path(self._worker.job.folder))

    def _request(self, step: int) -> Any:
        return self._source.request(step, *self._worker.slots(step))

    def _batch_of(self, step: int) -> Batch:
        return self._source.receive(self._request(step))

    def _batches(self, first: int, last: int) -> Iterator[tuple[int, Batch, float]]:
        """(step, this rank's batch, seconds waited for it). The next `prefetch` batches are requested in advance."""
        prefetch = self._worker.job.config.prefetch
        # Requests may pass the last step, because batches are defined for every step.
        pending = deque(self._request(step) for step in range(first, first + prefetch))
        for step in range(first, last):
            began = time.monotonic()
            batch = self._source.receive(pending.popleft())
            waited = time.monotonic() - began
            pending.append(self._request(step + prefetch))
            yield step, batch, waited
