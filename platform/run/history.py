"""Past runs, read from their events and the manifests of their artifacts. This module writes nothing.

A run is a folder under `runs/` with events. A run without a final event is `unfinished`: it is still running or was
killed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moray.platform.core.differences import Difference, differences
from moray.platform.core.errors import InputError, nearest
from moray.platform.core.events import MetricEvent, RunEvent, StepEvent, UsageEvent, read_events
from moray.platform.core.home import Home
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import artifact_by_fingerprint
from moray.platform.store.sweep import leased

_QUIET_SECONDS = 60.0  # a run without a lease and without events for this long is not between two steps


@dataclass
class StepRow:
    """One step of a run. Hours are cores (or GPUs) held times wall time, over all attempts in this run."""

    step: str
    state: str = "unfinished"
    fingerprint: str = ""
    seconds: float = 0.0
    outcome: str = ""
    core_hours: float = 0.0
    gpu_hours: float = 0.0
    artifact: str | None = None  # step/fingerprint, if it still exists


@dataclass
class RunRow:
    """One run. `seconds` is None until it ends; `problem` is the error if its events could not be read."""

    run: str
    recipe: str = ""
    state: str = "unfinished"
    started: float = 0.0
    seconds: float | None = None
    detail: str = ""
    steps: dict[str, StepRow] = field(default_factory=dict)
    problem: str = ""

    @property
    def made(self) -> int:
        return sum(step.state == "succeeded" for step in self.steps.values())

    @property
    def reused(self) -> int:
        return sum(step.state == "reused" for step in self.steps.values())


def list_runs(home: Home) -> list[RunRow]:
    """Returns every run, newest first. Runs whose events cannot be read are listed as `unreadable`."""
    return sorted((_read(path) for path in _folders(home)), key=lambda run: (run.started, run.run), reverse=True)


def find_run(home: Home, name: str) -> RunRow:
    """Returns a run by its name or a unique part of it, with its artifacts. Raises InputError.

    A run that exists only in the shared root is first copied to this machine.
    """
    store = ArtifactStore(home)
    folders = {path.name: path for path in _folders(home)}
    if store.remote is not None:
        folders = {known: home.runs / known for known in store.remote.runs()} | folders
    matches = [name] if name in folders else [known for known in folders if name in known]
    if not matches:
        raise InputError(f"unknown run {name!r}", nearest(name, folders))
    if len(matches) > 1:
        raise InputError(
            f"{name!r} matches {len(matches)} runs",
            f"give a longer part of the name: {', '.join(sorted(matches)[-3:])}",
        )
    if store.remote is not None and not folders[matches[0]].exists():
        store.remote.pull_run(matches[0], folders[matches[0]])
    run = _read(folders[matches[0]])
    if run.problem:
        raise InputError(f"run {run.run}: {run.problem}", "it may have been written by another version of Moray")
    for step in run.steps.values():
        found = artifact_by_fingerprint(store, step.fingerprint)
        step.artifact = found.reference if found else None
    return run


def in_use(home: Home) -> set[str]:
    """Fingerprints of active runs' steps: later steps may read them, though no manifest names them as inputs yet."""
    working = bool(leased(ArtifactStore(home)))
    found: set[str] = set()
    for path in _folders(home):
        latest = max((segment.stat().st_mtime for segment in (path / "events").glob("*.jsonl")), default=0.0)
        run = _read(path)
        if run.state == "unfinished" and (working or time.time() - latest < _QUIET_SECONDS):
            found |= {step.fingerprint for step in run.steps.values()}
    return found


@dataclass(frozen=True)
class StepChange:
    """A step that differs between two runs; a fingerprint is empty if that run did not reach the step."""

    step: str
    old: str
    new: str
    config: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class RunDifference:
    """Differences between two runs. `metrics`: (step, name) -> value in each run, None if absent."""

    same: tuple[str, ...]
    changed: tuple[StepChange, ...]
    metrics: dict[tuple[str, str], tuple[float | None, float | None]]


def diff_runs(home: Home, old: RunRow, new: RunRow) -> RunDifference:
    """Compares the artifacts of two runs, step by step."""
    store = ArtifactStore(home)
    same, changed = [], []
    metrics: dict[tuple[str, str], tuple[float | None, float | None]] = {}
    for key in {**old.steps, **new.steps}:
        one, other = old.steps.get(key, StepRow(key)), new.steps.get(key, StepRow(key))
        before, after = (artifact_by_fingerprint(store, row.fingerprint) for row in (one, other))
        if one.fingerprint == other.fingerprint:
            same.append(key)
        else:
            fields = tuple(differences(before.manifest.config, after.manifest.config)) if before and after else ()
            changed.append(StepChange(key, one.fingerprint, other.fingerprint, fields))
        values = [metrics_of(home, found) if found else {} for found in (before, after)]
        metrics |= {(key, name): (values[0].get(name), values[1].get(name)) for name in {**values[0], **values[1]}}
    return RunDifference(tuple(same), tuple(changed), metrics)


def metrics_of(home: Home, artifact: Artifact) -> dict[str, float]:
    """Returns the counts of an artifact, and the last value of each metric reported in the run that made it."""
    found = dict(artifact.manifest.counts)
    try:
        events = read_events(home.runs / artifact.manifest.run)
    except ValueError:
        return found
    keys = {e.step for e in events if isinstance(e, StepEvent) and e.fingerprint == artifact.fingerprint}
    for event in events:
        if isinstance(event, MetricEvent) and event.step in keys:
            found["/".join([event.name, *(value for _, value in sorted(event.labels.items()))])] = event.value
    return found


def _folders(home: Home) -> Iterator[Path]:
    return (path.parent for path in home.runs.glob("*/events"))


def _read(folder: Path) -> RunRow:
    """Reads a run from its runner's segment; training workers' segments are long and hold no states."""
    run = RunRow(folder.name)
    try:
        events = read_events(folder, "runner-*")
    except ValueError as error:
        run.state, run.problem = "unreadable", str(error).splitlines()[0]
        return run
    for event in events:
        match event:
            case RunEvent(state="started"):
                run.recipe, run.started = event.recipe, event.time
            case RunEvent():
                run.state, run.seconds, run.detail = event.state, event.time - run.started, event.detail
            case StepEvent():
                row = run.steps.setdefault(event.step, StepRow(event.step))
                row.state, row.fingerprint = event.state, event.fingerprint
                row.seconds, row.outcome = event.seconds, event.outcome
            case UsageEvent():
                row = run.steps.setdefault(event.step, StepRow(event.step))
                row.core_hours += event.seconds * event.cpus / 3600
                row.gpu_hours += event.seconds * event.gpus / 3600
            case _:
                pass
    return run
