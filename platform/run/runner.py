"""Runs a recipe. For each step: compute the fingerprint, reuse an existing artifact or run the step, write the
manifest.

Every fingerprint is known before anything starts, so `plan` and `run` decide by the same function, `plan_steps`. A
running step holds a lease; a concurrent run of the same work waits for it and reuses the result. When a run ends
(success, a failed step, Ctrl-C), the runner stops the cluster it started and writes a final event with the outcome.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moray.platform.core.atomic import is_full, write_json, write_text
from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import Cancelled, InputError, StepFailed
from moray.platform.core.events import Event, EventLog, EventTail, NoteEvent, RunEvent, StepEvent
from moray.platform.core.home import Home
from moray.platform.core.interrupts import until_interrupted
from moray.platform.core.references import Redactor, redacting
from moray.platform.plan import lineage
from moray.platform.plan.change_reason import explain_change, is_current
from moray.platform.plan.fingerprint import Address, addresses
from moray.platform.plan.recipe import PlannedStep, Recipe
from moray.platform.run.step_run import ActiveRun, RunResult, StepResult, StepRun, free_disk_hint, mid_run
from moray.platform.run.tracker import Tracker, open_sinks
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.paths import write_file
from moray.platform.store.search import newest_artifact
from moray.platform.store.segments import SegmentReader, SegmentWriter

_POLL_SECONDS, _STORE_POLL_SECONDS = 0.25, 2.0


@dataclass(frozen=True)
class Decision:
    """The decision to run or reuse one step, and the reason."""

    planned: PlannedStep
    address: Address
    reuse: bool
    why: str
    placement: str = ""  # the resources it will use, if there is a choice


def plan_steps(recipe: Recipe, store: ArtifactStore, topology: Topology | None = None) -> list[Decision]:
    """Decides for every step whether to run it or reuse its artifact, without starting or writing anything.

    topology: the machines to run on, if known. Raises InputError for a step that must run but cannot run on them.
    """
    decisions = []
    with redacting(Redactor.of(step.config for step in recipe.steps)):
        made = addresses(recipe, partial(_earlier, store))
    for planned, address in zip(recipe.steps, made.values(), strict=True):
        found = store.get(planned.step.name, address.fingerprint)
        if found is None:
            why = explain_change(address, newest_artifact(store, address.step))
        else:
            why = f"have {address.fingerprint[:8]}"
            why += f" in {store.remote.url}" if store.remote and not found.is_local else ""
            why += "" if is_current(planned.step, found) else ", made by a different code version"
        placement = planned.step.placement(planned.config, topology) if topology and not found else ""
        decisions.append(Decision(planned, address, found is not None, why, placement))
    return decisions


def _earlier(store: ArtifactStore, planned: PlannedStep, inputs: Mapping[str, str]) -> str | None:
    found = lineage.earlier(store, planned, inputs)
    return found.fingerprint if found else None


class Runner:
    """Executes one recipe once. Starts `cluster` only if a step needs it."""

    def __init__(self, home: Home, cluster: Cluster, listeners: list[Callable[[Event], None]] | None = None) -> None:
        self.home = home
        self.store = ArtifactStore(home)
        self.cluster = cluster
        self.listeners = listeners or []

    def run(self, recipe: Recipe, name: str = "") -> RunResult:
        """Runs the steps whose artifacts do not exist. Raises StepFailed, MorayError, or Cancelled after cleaning up.

        name: the name of the run and its folder; by default the time, the recipe and a random suffix.
        """
        self.store.check()
        if self.store.remote is None and not self.cluster.shares_files:
            raise InputError(
                "the hosts of this cluster do not share a disk, and there is no store for the files of the run",
                "set MORAY_ARTIFACTS=s3://bucket/prefix, or to a folder that all hosts see",
            )
        sinks = open_sinks(recipe, self.home)
        name = name or f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe.name}-{secrets.token_hex(2)}"
        folder = self.home.runs / name
        write_text(folder / "recipe.yaml", recipe.source)
        redact = Redactor.of([*(step.config for step in recipe.steps), recipe.tracking])
        events = EventLog(folder / "events", "runner", redact)
        tracker = Tracker(recipe, sinks, lambda level, text: _note(events, level, text))
        events.listeners += [*self.listeners, tracker]
        result = RunResult(name, recipe.name, folder, 0.0)
        run = ActiveRun(self.home, self.store, self.cluster, events, result, threading.Event())
        began = time.monotonic()
        events.append(RunEvent(state="started", recipe=recipe.name, detail=name))
        state, detail = "failed", ""
        try:
            with until_interrupted(run.cancelled.set), self._followed(run), redacting(redact):
                for decision in plan_steps(recipe, self.store, self.cluster.topology()):
                    result.steps[decision.planned.key] = self._step(decision, run)
            write_json(folder / "result.json", {key: row.artifact.reference for key, row in result.steps.items()})
            state = "succeeded"
        except (Cancelled, KeyboardInterrupt) as stop:
            if run.unsatisfiable:
                detail = run.unsatisfiable
                raise InputError(detail) from stop
            state = "cancelled"
            raise
        except BaseException as error:
            detail = str(error)
            if isinstance(error, OSError) and is_full(error):  # between two steps
                raise StepFailed(detail, free_disk_hint(self.home)) from error
            raise
        finally:
            self.cluster.stop()
            tracker.close()
            result.seconds = time.monotonic() - began
            events.append(RunEvent(state=state, recipe=recipe.name, detail=detail))
            self._keep_run(run)
            events.close()
        return result

    @contextmanager
    def _followed(self, run: ActiveRun) -> Iterator[None]:
        """Forwards events of the run's other processes to the listeners; in the store, if these are on other hosts."""
        if self.cluster.shares_files or self.store.remote is None:
            with _follow(run.result.folder / "events", run.events):
                yield
            return
        stored = self.store.remote.run(run.result.run)
        write_file(stored / "recipe.yaml", (run.result.folder / "recipe.yaml").read_bytes())
        run.segments = SegmentWriter(run.result.folder, stored)
        with _follow(run.result.folder / "events", run.events, SegmentReader(stored, run.result.folder)):
            yield

    def _keep_run(self, run: ActiveRun) -> None:
        """Copies the run's folder to the shared root, so that it stays readable without this machine."""
        try:
            if run.segments is not None:
                run.segments.close()
            elif self.store.remote is not None:
                self.store.remote.push_run(run.result.folder)
        except (InputError, OSError) as error:  # must not hide how the run ended
            text = f"the run's folder was not copied to the shared root: {error}"
            run.events.append(NoteEvent(step="", level="warning", text=text))

    def _step(self, decision: Decision, run: ActiveRun) -> StepResult:
        planned, address = decision.planned, decision.address
        step, fingerprint = planned.step, address.fingerprint
        found = self.store.get(step.name, fingerprint)
        lease = self.store.lease(step.name, fingerprint, not self.cluster.shares_files, run.result.run)
        if found is None and not lease.acquire():
            holder = lease.holder()
            why = f"process {holder.get('pid')} on {holder.get('host')} is running this step"
            run.events.append(StepEvent(step=planned.key, state="waiting", fingerprint=fingerprint, why=why))
            done = lambda: self.store.get(step.name, fingerprint) is not None  # noqa: E731
            if not lease.wait(done, run.cancelled.is_set) and run.cancelled.is_set():
                raise Cancelled
        try:
            found = self.store.get(step.name, fingerprint)
            if found is not None:
                row = self._reused(planned, found, decision.why, run.events)
            else:
                why = decision.why
                run.events.append(StepEvent(step=planned.key, state="started", fingerprint=fingerprint, why=why))
                row = StepRun(run, planned, address).execute()
            if name := step.chain(planned.config):
                lineage.advance(self.store, self.home, name, row.artifact)
            return row
        finally:
            lease.release()

    def _reused(self, planned: PlannedStep, found: Artifact, why: str, events: EventLog) -> StepResult:
        with mid_run():
            found = self.store.publish(found)
        manifest = found.manifest
        if not is_current(planned.step, found):
            made = f"{manifest.step}/{found.fingerprint[:8]}"
            text = f"{planned.key}: the code of this step has changed since {made} was made"
            hint = f"to rerun it: `moray artifacts rm {found.reference}`"
            events.append(NoteEvent(step=planned.key, level="warning", text=f"{text}; {hint}"))
        event = StepEvent(
            step=planned.key,
            state="reused",
            fingerprint=found.fingerprint,
            why=why,
            counts=manifest.counts,
            outcome=manifest.outcome,
        )
        events.append(event)
        return StepResult(planned.key, planned.step.name, True, 0.0, found)


def _note(events: EventLog, level: str, text: str) -> None:
    events.append(NoteEvent(step="", level="warning" if level == "warning" else "info", text=text))


@contextmanager
def _follow(folder: Path, events: EventLog, segments: SegmentReader | None = None) -> Iterator[None]:
    """Forwards new events of other writers (training workers) to this process's listeners. segments: brings them."""
    tail = EventTail(folder, skip_writer=events.writer)
    done = threading.Event()

    def pump() -> None:
        last = False
        while not last:
            last = done.wait(_STORE_POLL_SECONDS if segments else _POLL_SECONDS)
            with contextlib.suppress(InputError):  # the store is away: the next round brings more
                if segments:
                    segments.poll()
            for event in tail.poll():
                for listener in events.listeners:
                    listener(event)

    thread = threading.Thread(target=pump, name="event tail", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
