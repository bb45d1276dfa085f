"""Executes one step of a run: fetches its inputs, runs it, commits its artifact, records how it ended."""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import Cancelled, InputError, MorayError, StepFailed
from moray.platform.core.events import EventLog, StepEvent, UsageEvent
from moray.platform.core.home import Home
from moray.platform.core.interrupts import interrupt
from moray.platform.plan.code_hash import source_hash
from moray.platform.plan.context import StepContext
from moray.platform.plan.fingerprint import EARLIER, Address
from moray.platform.plan.recipe import PlannedStep
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.manifest import FileEntry, Manifest, code_revision, environment, hash_folder
from moray.platform.store.paths import entries_below, remove_folder
from moray.platform.store.search import find_artifact
from moray.platform.store.segments import SegmentWriter
from moray.platform.store.verify import check_sizes

# Error texts of the operating system and SQLite.
_FULL = re.compile("No space left on device|Disk quota exceeded|database or disk is full")
_End = Literal["succeeded", "failed", "cancelled"]


@dataclass
class StepResult:
    """The result of one step: a row of the closing table."""

    key: str
    step: str
    reused: bool
    seconds: float
    artifact: Artifact


@dataclass
class RunResult:
    """A finished run. `steps` is keyed by step key, in the order they ran."""

    run: str
    recipe: str
    folder: Path
    seconds: float
    steps: dict[str, StepResult] = field(default_factory=dict)


@dataclass
class ActiveRun:
    """State shared by the steps of one run. `result` holds the completed steps."""

    home: Home
    store: ArtifactStore
    cluster: Cluster
    events: EventLog
    result: RunResult
    cancelled: threading.Event
    segments: SegmentWriter | None = None  # uploads events and logs, if the run's hosts share no disk
    unsatisfiable: str = ""  # the resource request of the current step that can never be placed


class StepRun:
    """The execution of one step, from its inputs to its artifact."""

    def __init__(self, run: ActiveRun, planned: PlannedStep, address: Address) -> None:
        self._run = run
        self._planned, self._step, self._address = planned, planned.step, address
        self._context: StepContext[Any] = StepContext(
            step=planned.key,
            config=planned.config,
            inputs={},
            folder=run.store.prepare(planned.step.name, address.fingerprint, planned.step.resumable),
            home=run.home,
            run=run.result.folder,
            events=run.events,
            cluster=run.cluster,
            fingerprint=address.fingerprint,
            name=run.result.recipe,
            cancel=run.cancelled.is_set,
            stored=None
            if run.cluster.shares_files or run.store.remote is None
            else run.store.remote.output(planned.step.name, address.fingerprint),
        )
        self._topology = run.cluster.topology()
        self._started, self._began = time.time(), time.monotonic()

    def execute(self) -> StepResult:
        """Runs the step. Raises StepFailed, another MorayError, or Cancelled, after writing the final events."""
        state: _End = "failed"
        try:
            with self._watching_cluster(), _explained(self._context):
                self._context.inputs = self._inputs()
                if self._context.stored and not self._step.resumable:
                    remove_folder(self._context.stored)
                if self._step.needs_ray:
                    self._topology = self._run.cluster.ensure()
                self._step.run(self._context)
                artifact = self._commit()
            state = "succeeded"
        except (Cancelled, KeyboardInterrupt):
            state = "failed" if self._run.unsatisfiable else "cancelled"
            raise
        finally:
            seconds = self._report(state)
        return StepResult(self._planned.key, self._step.name, False, seconds, artifact)

    @contextmanager
    def _watching_cluster(self) -> Iterator[None]:
        """Reports requests that the cluster cannot place as warnings of this step; ends the step if it never can."""
        cluster = self._run.cluster
        cluster.on_pending = lambda text: self._context.note(text, "warning")
        cluster.on_unsatisfiable = self._give_up
        try:
            yield
        finally:
            cluster.on_pending = cluster.on_unsatisfiable = None

    def _give_up(self, text: str) -> None:
        """Interrupts the step like Ctrl-C, because Ray would wait indefinitely. Called from another thread."""
        self._context.note(text, "warning")
        self._run.unsatisfiable = f"step {self._planned.key!r}: {text}"
        self._run.cancelled.set()
        interrupt()

    def _inputs(self) -> dict[str, Artifact]:
        """Artifacts of the input steps by input name, plus the previous link of a chain, ready to be read."""
        in_place = self._step.reads_in_place(self._planned.config)
        rows = self._run.result.steps
        inputs = {name: self._fetch(rows[key].artifact, name in in_place) for name, key in self._planned.inputs.items()}
        if EARLIER in self._address.inputs:
            link = find_artifact(self._run.store, f"{self._step.name}/{self._address.inputs[EARLIER]}")
            inputs[EARLIER] = self._fetch(link, EARLIER in in_place)
        return inputs

    def _fetch(self, artifact: Artifact, in_place: bool) -> Artifact:
        """Returns an input with its files on this host, or, if read in place, with their address. If tasks run on
        other hosts, it has an address that these can read."""
        store, everywhere = self._run.store, not self._run.cluster.shares_files
        with mid_run():
            url = store.locate(artifact, everywhere=True).url if everywhere else ""
            if in_place:
                found = replace(artifact, url=url) if url else store.locate(artifact)
            else:
                found = replace(store.fetch(artifact, self._transferred), url=url)
            self._check(found)
        return found

    def _check(self, artifact: Artifact) -> None:
        """Raises InputError if local input files no longer match their manifest."""
        if artifact.is_local:
            remote, step = self._run.store.remote, artifact.manifest.step
            shared = lambda: remote is not None and remote.get_or_none(step, artifact.fingerprint) is not None  # noqa: E731
            check_sizes(artifact.folder, artifact.manifest, shared)

    def _commit(self) -> Artifact:
        context, step, seconds = self._context, self._step, time.monotonic() - self._began
        local = hash_folder(context.folder)
        files = _joined(local, entries_below(context.stored)) if context.stored else local
        manifest = Manifest(
            step=step.name,
            step_version=step.version,
            fingerprint=self._address.fingerprint,
            produces=step.produces,
            config=self._planned.config.model_dump(mode="json"),
            address=asdict(self._address),
            inputs={name: artifact.reference for name, artifact in context.inputs.items()},
            files=files,
            bytes=sum(file.size for file in files),
            counts=context.counts,
            outcome=context.events.redact(context.outcome),
            run=context.run.name,
            code={**code_revision(), "source": source_hash(step)},
            environment=environment(),
            started=self._started,
            seconds=seconds,
            cpu_seconds=seconds * self._topology.cpus,
            gpu_seconds=seconds * self._topology.gpus,
        )
        with mid_run():
            if context.stored:
                return self._run.store.complete(manifest, local, self._transferred)
            return self._run.store.commit(manifest, self._transferred)

    def _transferred(self, phase: str, done: float, total: float) -> None:
        self._context.progress(phase, done, total, "bytes")

    def _report(self, state: _End) -> float:
        """Writes the usage and final events of the step; returns its duration in seconds."""
        key, seconds, topology = self._planned.key, time.monotonic() - self._began, self._topology
        append = self._run.events.append
        append(UsageEvent(step=key, seconds=seconds, state=state, cpus=topology.cpus, gpus=topology.gpus))
        done = state == "succeeded"
        event = StepEvent(
            step=key,
            state=state,
            fingerprint=self._address.fingerprint,
            seconds=seconds,
            counts=self._context.counts if done else {},
            outcome=self._context.outcome if done else "",
        )
        append(event)
        return seconds


def _joined(local: Sequence[FileEntry], stored: Sequence[FileEntry]) -> list[FileEntry]:
    """All files of an artifact, sorted by path. A local file replaces one that an earlier attempt uploaded."""
    found = {entry.path: entry for entry in (*stored, *local)}
    return [found[path] for path in sorted(found)]


def free_disk_hint(home: Home) -> str:
    """The hint for a full disk."""
    return f"free disk space for {home.root}, then run again"


@contextmanager
def mid_run() -> Iterator[None]:
    """Converts InputError to StepFailed: during a run, errors of the shared root are not user mistakes, and a rerun
    resumes."""
    try:
        yield
    except InputError as error:
        raise StepFailed(error.message, error.hint) from error


@contextmanager
def _explained(context: StepContext[Any]) -> Iterator[None]:
    """Converts other exceptions to StepFailed, with the traceback in a file. Sets the hint for a full disk."""
    try:
        yield
    except Cancelled:
        raise
    except MorayError as error:
        if not _FULL.search(error.message):
            raise
        raise StepFailed(error.message, free_disk_hint(context.home)) from error
    except Exception as error:
        message = f"step {context.step!r} failed: {type(error).__name__}: {_first_line(error)}"
        context.write_log("traceback", traceback.format_exc())
        hint = free_disk_hint(context.home) if _FULL.search(str(error)) else f"details: {context.log_path('traceback')}"
        raise StepFailed(message, hint) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else ""
