"""Events of a training run: steps, saves and notes, for the runner, MLflow and the page."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal

import psutil
import torch

from moray.kernels.util.device import runtime
from moray.models.flops import utilisation
from moray.pipelines.pretrain.checkpoint.archive import Archived
from moray.pipelines.pretrain.checkpoint.checkpoints import Restored, Saved
from moray.pipelines.pretrain.gauges import Gauges
from moray.pipelines.pretrain.held_out_loss import HeldOutLoss
from moray.pipelines.pretrain.peak_flops import peak_flops
from moray.pipelines.pretrain.resilience.guard import GuardRecord
from moray.pipelines.pretrain.stragglers import StragglerWatch
from moray.pipelines.pretrain.worker import Worker
from moray.platform.core.events import EventLog, MetricEvent, NoteEvent, ProgressEvent
from moray.platform.store.paths import AnyPath

_OLDER_WEIGHTS = "older weights route tokens for the next steps"
REPORT_SECONDS = 1.0
LOAD_ROWS = 200  # reports of each layer's expert load per run, which bounds the width of the heat map


class StartTimer:
    """Times the phases of a worker process up to the end of its first step. phases: seconds by name, in order."""

    def __init__(self) -> None:
        self._last = time.time()
        self.phases = {"process": self._last - psutil.Process().create_time()}

    def reached(self, phase: str) -> None:
        """Records that the phase of this name has ended."""
        now = time.time()
        self.phases[phase] = now - self._last
        self._last = now


class Report:
    """Writes events on rank 0: a loss for every step, progress and rates about once a second. hosts: of each rank."""

    def __init__(self, worker: Worker, events: EventLog | None, tokens: int, hosts: Sequence[str]) -> None:
        self._worker = worker
        self._step = worker.job.step
        self._total = worker.total_tokens
        self._events = events
        self._gauges = Gauges()
        self._last = (time.monotonic(), tokens)
        self._waited = 0.0
        self._layers = worker.job.model.moe_layers
        self._peak = peak_flops(worker.device) if events else math.inf
        self._load_row = self._sources_row = -1
        self._by_source = [0.0] * (2 * len(worker.job.sources))  # losses and targets since they were reported
        self._stragglers = StragglerWatch(worker.job.config.resilience.stragglers, hosts)
        self._straggler = ""  # shown beside the progress
        self._failures = 0
        self._archive_failures = 0

    def add(self, step: int, tokens: int, metrics: dict[str, float], load_L: torch.Tensor, waited: float) -> None:
        if self._events is None:
            return
        self._waited += waited
        metrics = dict(metrics)
        self._metric("train_loss", metrics.pop("train_loss"), step)
        now = time.monotonic()
        elapsed = now - self._last[0]
        if elapsed < REPORT_SECONDS and tokens < self._total:
            return
        rate = (tokens - self._last[1]) / elapsed
        for name, value in metrics.items():
            self._metric(name, value, step)
        self._metric("train_tokens", tokens, step)
        self._metric("train_tokens_per_second", rate, step)
        self._metric("train_data_wait", self._waited / elapsed, step)
        self._metric("train_exposed_communication", self._worker.mesh.clock.take() / elapsed, step)
        self._use(rate, step)
        self._sources(tokens, step)
        self._load(load_L, tokens, step)
        self._events.append(
            ProgressEvent(
                step=self._step,
                phase="training",
                done=tokens,
                total=self._total,
                unit="tokens",
                detail=self._straggler,
            )
        )
        self._last, self._waited = (now, tokens), 0.0

    def compared(self, step: int, busy_R: Sequence[float]) -> None:
        """Reports the slowest of the ranks by their busy times, and warns of ranks that stay slow. Does nothing if
        `busy_R` is empty, as in steps that compare no times."""
        if self._events is None or not busy_R:
            return
        slowest, warning = self._stragglers.update(busy_R)
        if slowest is None:
            return
        self._metric("train_slowest_rank", slowest.rank, step)
        self._metric("train_slowest_rank_excess", slowest.excess, step)
        self._metric("train_busy_seconds", slowest.seconds, step, rank="slowest")
        self._metric("train_busy_seconds", slowest.median, step, rank="median")
        is_slow = self._stragglers.exceeds(slowest)
        self._straggler = f"{self._stragglers.place(slowest.rank)} is {slowest.excess:.0%} slower" if is_slow else ""
        if warning:
            self.note(warning, "warning")

    def saved(self, ended: list[Saved]) -> None:
        """Reports saves that ended; a failed save is a warning."""
        for one in ended:
            if one.error:
                self._failures += 1
                self._metric("train_checkpoint_failures", self._failures, one.steps)
                self.note(
                    f"the checkpoint at step {one.steps} was not written ({one.error}); the previous one is kept",
                    "warning",
                )
            else:
                self._metric("train_checkpoint_seconds", one.stalled, one.steps)
                self._metric("train_checkpoint_write_seconds", one.seconds, one.steps)
                self._metric("train_checkpoint_bytes", one.bytes, one.steps)

    def archived(self, ended: list[Archived]) -> None:
        """Reports this rank's copies to the archive that ended; a failed copy is a warning."""
        for one in ended:
            self._archive_failures += bool(one.error)
            self._metric("train_archive_failures", self._archive_failures, one.steps)
            if one.error:
                self.note(
                    f"the checkpoint at step {one.steps} was not archived ({one.error}); it stays on disk, and the "
                    "copy is retried",
                    "warning",
                )

    def count_sources(self, sums: Sequence[float]) -> None:
        """Adds a step's losses and targets by source (`Measured.sources`)."""
        self._by_source = [before + more for before, more in zip(self._by_source, sums, strict=True)]

    def held_out(self, step: int, found: HeldOutLoss, seconds: float) -> None:
        """Reports the held-out loss. seconds: the duration of its measurement, which is no training time."""
        for source, loss in {"all": found.total, **found.sources}.items():
            self._metric("train_heldout_loss", loss, step, source=source)
        self._metric("train_heldout_seconds", seconds, step)
        self._last = (self._last[0] + seconds, self._last[1])

    def profiled(self, trace: AnyPath | None) -> None:
        """Reports where a trace was written, if one was."""
        if trace is not None:
            self.note(f"profile: {trace}")

    def restored(self, restored: Restored) -> None:
        """Reports the checkpoint and the number of ranks that training resumes with, and warnings of the restore."""
        self._metric("train_workers", self._worker.mesh.world, restored.steps)
        for text in restored.warnings:
            self.note(text, "warning")
        if restored.steps:
            source = ", fetched from the archive" if restored.fetched else ""
            workers = self._worker.mesh.world
            self.note(f"resuming from the checkpoint at step {restored.steps}{source}, with {workers} workers")

    def started(self, start: StartTimer) -> None:
        """Reports the time from the start of this process to the end of its first step, by phase."""
        for phase, seconds in start.phases.items():
            self._metric("train_start_seconds", seconds, phase=phase)

    def skipped(self, history: GuardRecord) -> None:
        """Reports the last skipped batch."""
        batch = history.skipped[-1]
        self._metric("train_skipped_batches", len(history.skipped), batch.step + 1)
        routing = f"; {_OLDER_WEIGHTS}" if history.anticipated[1] > batch.step else ""
        self.note(f"the batch of step {batch.step + 1} is skipped: {batch.why}{routing}", "warning")

    def empty(self, step: int) -> None:
        """Reports a batch that is skipped because it has no target."""
        self.note(f"the batch of step {step + 1} is skipped: none of its tokens has a target")

    def rolled_back(self, step: int, culprit: int, to: Restored, history: GuardRecord) -> None:
        """Reports a rollback from `step` to a checkpoint, after which the batch of `culprit` is skipped."""
        self._metric("train_skipped_batches", len(history.skipped), culprit + 1)
        self._metric("train_rollbacks", history.rollbacks, step + 1)
        self.note(
            f"the weights are bad at step {step + 1}: training rolls back to step {to.steps} and skips the batch of "
            f"step {culprit + 1}; {_OLDER_WEIGHTS}",
            "warning",
        )
        self._last = (time.monotonic(), to.tokens)

    def note(self, text: str, level: Literal["info", "warning"] = "info") -> None:
        if self._events:
            self._events.append(NoteEvent(step=self._step, level=level, text=text))

    def _use(self, rate: float, step: int) -> None:
        """Reports utilization at `rate` tokens per second, and memory."""
        worker, world = self._worker, self._worker.mesh.world
        self._metric("train_tokens_per_second_per_worker", rate / world, step)
        for attention, causal in (("causal", True), ("whole", False)):
            use = utilisation(worker.job.model, worker.job.sequence_length, rate, world, self._peak, causal)
            self._metric("train_mfu", use.share, step, attention=attention)
        biases = [bias_E.max() - bias_E.min() for _, bias_E in worker.model.logical_biases()]
        if biases:
            self._metric("train_bias_range", max(biases).item(), step)
        self._metric("train_memory_bytes", runtime(worker.device).peak_bytes(), step)

    def _load(self, load_L: torch.Tensor, tokens: int, step: int) -> None:
        """Reports the load of every MoE layer, LOAD_ROWS times per run, because a model may have 60 such layers."""
        row = tokens * LOAD_ROWS // self._total
        if row > self._load_row:
            for layer, load in zip(self._layers, load_L.tolist(), strict=True):
                self._metric("train_expert_load", load, step, layer=str(layer))
            self._load_row = row

    def _sources(self, tokens: int, step: int) -> None:
        """Reports the mean loss of every source since the last time, LOAD_ROWS times per run."""
        row = tokens * LOAD_ROWS // self._total
        if row > self._sources_row:
            pairs = zip(self._by_source[::2], self._by_source[1::2], strict=True)
            for source, (loss, count) in zip(self._worker.job.sources, pairs, strict=True):
                if count:
                    self._metric("train_loss_by_source", loss / count, step, source=source)
            self._by_source, self._sources_row = [0.0] * len(self._by_source), row

    def _metric(self, name: str, value: float, step: int = 0, **labels: str) -> None:
        if self._events:
            event = MetricEvent(step=self._step, name=name, value=value, at=step, labels=labels)
            self._events.append(event)
            self._gauges.show(event)
