"""Runs a recipe: for each step fingerprint -> have it? -> run -> manifest.

Every fingerprint is known before anything starts, so `plan_steps` and `run` decide by the same function. A step in work
is leased; a rival run of the same work waits and reuses. Whatever ends a run (success, a failing step, Ctrl-C), the
cluster it started is stopped and the last event says how it ended.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moray.platform.core.atomic import is_full, write_json, write_text
from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import Cancelled, InputError, MorayError, StepFailed
from moray.platform.core.events import Event, EventLog, EventTail, NoteEvent, RunEvent, StepEvent, UsageEvent
from moray.platform.core.home import Home
from moray.platform.core.interrupts import interrupt, until_interrupted
from moray.platform.core.references import Redactor, redacting
from moray.platform.plan import lineage
from moray.platform.plan.change_reason import explain_change, is_current
from moray.platform.plan.code_hash import source_hash
from moray.platform.plan.context import StepContext
from moray.platform.plan.fingerprint import EARLIER, Address, addresses
from moray.platform.plan.recipe import PlannedStep, Recipe
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.lease import Lease
from moray.platform.store.lease import holder as lease_holder
from moray.platform.store.manifest import Manifest, code_revision, environment, hash_folder
from moray.platform.store.verify import check_sizes

# As the system and SQLite say it.
_FULL = re.compile("No space left on device|Disk quota exceeded|database or disk is full")


@dataclass(frozen=True)
class Decision:
    """What will happen to one step, and why."""

    planned: PlannedStep
    address: Address
    reuse: bool
    why: str
    placement: str = ""  # what it will run on, where there is something to choose


@dataclass
class StepResult:
    """What happened to one step: a row of the closing table."""

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


def plan_steps(recipe: Recipe, store: ArtifactStore, topology: Topology | None = None) -> list[Decision]:
    """Decides for every step whether its artifact is there, without starting or writing anything.

    topology: the machines it is to run on, if known. Raises InputError for a step that has to run and cannot there.
    """
    decisions = []
    with redacting(Redactor.of(step.config for step in recipe.steps)):
        made = addresses(recipe, partial(_before, store))
    for planned, address in zip(recipe.steps, made.values(), strict=True):
        found = store.get(planned.step.name, address.fingerprint)
        if found is None:
            why = explain_change(address, store.newest(address.step))
        else:
            why = f"have {address.fingerprint[:8]}"
            why += f" in {store.remote.url}" if store.remote and not found.here else ""
            why += "" if is_current(planned.step, found) else ", made by other code"
        placement = planned.step.placement(planned.config, topology) if topology and not found else ""
        decisions.append(Decision(planned, address, found is not None, why, placement))
    return decisions


def _before(store: ArtifactStore, planned: PlannedStep, inputs: Mapping[str, str]) -> str | None:
    found = lineage.earlier(store, planned, inputs)
    return found.fingerprint if found else None


class Runner:
    """Executes one recipe once. `cluster` is only asked to start if a step needs it."""

    def __init__(self, home: Home, cluster: Cluster, listeners: list[Callable[[Event], None]] | None = None) -> None:
        self.home = home
        self.store = ArtifactStore(home)
        self.cluster = cluster
        self.listeners = listeners or []
        self._cancelled = threading.Event()
        self._hopeless = ""  # what the step at work waits for and can never get

    def run(self, recipe: Recipe, name: str = "") -> RunResult:
        """Runs what is not there yet. Raises StepFailed, MorayError, or Cancelled after cleaning up.

        name: of the run and its folder; by default made of time and recipe.
        """
        self.store.check()
        run = name or f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe.name}-{secrets.token_hex(2)}"
        folder = self.home.runs / run
        write_text(folder / "recipe.yaml", recipe.source)
        redact = Redactor.of(step.config for step in recipe.steps)
        events = EventLog(folder / "events", "runner", redact)
        events.listeners += self.listeners
        result = RunResult(run, recipe.name, folder, 0.0)
        began = time.monotonic()
        events.append(RunEvent(state="started", recipe=recipe.name, detail=run))
        state, detail = "failed", ""
        try:
            with until_interrupted(self._cancelled.set), _follow(folder / "events", events), redacting(redact):
                for decision in plan_steps(recipe, self.store, self.cluster.topology()):
                    result.steps[decision.planned.key] = self._step(decision, result, events)
            write_json(folder / "result.json", {key: row.artifact.reference for key, row in result.steps.items()})
            state = "succeeded"
        except (Cancelled, KeyboardInterrupt) as stop:
            if self._hopeless:
                detail = self._hopeless
                raise InputError(detail) from stop
            state = "cancelled"
            raise
        except BaseException as error:
            detail = str(error)
            if isinstance(error, OSError) and is_full(error):  # between two steps
                raise StepFailed(detail, self._free_some()) from error
            raise
        finally:
            self.cluster.stop()
            result.seconds = time.monotonic() - began
            events.append(RunEvent(state=state, recipe=recipe.name, detail=detail))
            self._keep_run(folder, events)
            events.close()
        return result

    def _keep_run(self, folder: Path, events: EventLog) -> None:
        """Copies the run's folder to the shared root: what it did can be read when this machine is gone."""
        try:
            if self.store.remote is not None:
                self.store.remote.push_run(folder)
        except (InputError, OSError) as error:  # how the run ended matters more
            text = f"the run's folder is not copied: {error}"
            events.append(NoteEvent(step="", level="warning", text=text))

    def _step(self, decision: Decision, result: RunResult, events: EventLog) -> StepResult:
        planned, address = decision.planned, decision.address
        step, fingerprint = planned.step, address.fingerprint
        found = self.store.get(step.name, fingerprint)
        lease = Lease(self.store.lease_path(step.name, fingerprint))
        if found is None and not lease.acquire():
            who = lease_holder(lease.path)
            why = f"process {who.get('pid')} on {who.get('host')} is making it"
            events.append(StepEvent(step=planned.key, state="waiting", fingerprint=fingerprint, why=why))
            made = lambda: self.store.get(step.name, fingerprint) is not None  # noqa: E731
            if not lease.wait(made, self._cancelled.is_set) and self._cancelled.is_set():
                raise Cancelled
        try:
            found = self.store.get(step.name, fingerprint)
            if found is not None:
                row = self._reused(planned, found, decision.why, events)
            else:
                row = self._execute(planned, address, decision.why, result, events)
            if name := step.chain(planned.config):
                lineage.advance(self.store, self.home, name, row.artifact)
            return row
        finally:
            lease.release()

    def _reused(self, planned: PlannedStep, found: Artifact, why: str, events: EventLog) -> StepResult:
        with _mid_run():
            found = self.store.publish(found)
        manifest = found.manifest
        if not is_current(planned.step, found):
            made = f"{manifest.step}/{found.fingerprint[:8]}"
            text = f"{planned.key}: the code of this step has changed since {made} was made"
            remedy = f"`moray artifacts rm {found.reference}` to make it anew"
            events.append(NoteEvent(step=planned.key, level="warning", text=f"{text}; {remedy}"))
        events.append(
            StepEvent(
                step=planned.key, state="reused", fingerprint=found.fingerprint, why=why, counts=manifest.counts,
                outcome=manifest.outcome,
            )
        )  # fmt: skip
        return StepResult(planned.key, planned.step.name, True, 0.0, found)

    def _execute(
        self, planned: PlannedStep, address: Address, why: str, result: RunResult, events: EventLog
    ) -> StepResult:
        step, fingerprint = planned.step, address.fingerprint
        events.append(StepEvent(step=planned.key, state="started", fingerprint=fingerprint, why=why))
        context: StepContext[Any] = StepContext(
            step=planned.key, config=planned.config, inputs={}, home=self.home, run=result.folder, events=events,
            folder=self.store.prepare(step.name, fingerprint, step.resumable), cluster=self.cluster,
            fingerprint=fingerprint, name=result.recipe, cancel=self._cancelled.is_set,
        )  # fmt: skip
        started, began = time.time(), time.monotonic()
        topology, state = self.cluster.topology(), "failed"
        self.cluster.on_pending = lambda text: context.note(text, "warning")
        self.cluster.on_hopeless = partial(self._give_up, context)
        try:
            with self._explained(context):
                in_place = step.reads_in_place(planned.config)
                context.inputs = {
                    name: self._fetch(result.steps[at], context, in_place=name in in_place)
                    for name, at in planned.inputs.items()
                }
                if EARLIER in address.inputs:
                    link = self.store.find(f"{step.name}/{address.inputs[EARLIER]}")
                    link = self.store.fetch(link, _progress(context))
                    self._check(link)
                    context.inputs = {**context.inputs, EARLIER: link}
                if step.needs_ray:
                    topology = self.cluster.ensure()
                step.run(context)
                artifact = self._commit(planned, address, context, topology, started, time.monotonic() - began)
            state = "succeeded"
        except (Cancelled, KeyboardInterrupt) as stop:
            if not self._hopeless:
                state = "cancelled"
                raise
            raise InputError(self._hopeless) from stop
        finally:
            self.cluster.on_pending = self.cluster.on_hopeless = None
            held = time.monotonic() - began
            events.append(
                UsageEvent(step=planned.key, seconds=held, state=state, cpus=topology.cpus, gpus=topology.gpus)
            )
            if state != "succeeded":
                events.append(StepEvent(step=planned.key, state=state, fingerprint=fingerprint, seconds=held))
        events.append(
            StepEvent(
                step=planned.key, state="succeeded", fingerprint=fingerprint, seconds=held,
                counts=context.counts, outcome=context.outcome,
            )
        )  # fmt: skip
        return StepResult(planned.key, step.name, False, held, artifact)

    def _give_up(self, context: StepContext[Any], text: str) -> None:
        """Ends the step at work as Ctrl-C would: Ray would have it wait for ever. Called from another thread."""
        context.note(text, "warning")
        self._hopeless = f"step {context.step!r}: {text}"
        self._cancelled.set()
        interrupt()

    def _fetch(self, row: StepResult, context: StepContext[Any], in_place: bool) -> Artifact:
        """An earlier step's artifact with its files on this machine, or with the address that they are read at."""
        with _mid_run():
            if in_place:
                found = self.store.locate(row.artifact)
            else:
                found = row.artifact = self.store.fetch(row.artifact, _progress(context))
            self._check(found)
        return found

    def _check(self, artifact: Artifact) -> None:
        """Raises InputError if files that a step is to read here are not as they were made."""
        if not artifact.url:
            remote, step = self.store.remote, artifact.manifest.step
            shared = lambda: remote is not None and remote.whole(step, artifact.fingerprint) is not None  # noqa: E731
            check_sizes(artifact.folder, artifact.manifest, shared)

    @contextmanager
    def _explained(self, context: StepContext[Any]) -> Iterator[None]:
        """What is no MorayError becomes one, with the traceback in a file. A full disk is named, wherever it shows."""
        try:
            yield
        except Cancelled:
            raise
        except MorayError as error:
            if not _FULL.search(error.message):
                raise
            raise StepFailed(error.message, self._free_some()) from error
        except Exception as error:
            what = f"step {context.step!r} failed: {type(error).__name__}: {_first_line(error)}"
            context.write_log("traceback", traceback.format_exc())
            hint = self._free_some() if _FULL.search(str(error)) else f"details: {context.log_path('traceback')}"
            raise StepFailed(what, hint) from error

    def _free_some(self) -> str:
        return f"free some disk for {self.home.root}, then run again"

    def _commit(
        self, planned: PlannedStep, address: Address, context: StepContext[Any], topology: Topology,
        started: float, seconds: float,
    ) -> Artifact:  # fmt: skip
        files = hash_folder(context.folder)
        manifest = Manifest(
            step=planned.step.name,
            step_version=planned.step.version,
            fingerprint=address.fingerprint,
            produces=planned.step.produces,
            config=planned.config.model_dump(mode="json"),
            address=asdict(address),
            inputs={name: artifact.reference for name, artifact in context.inputs.items()},
            files=files,
            bytes=sum(file.size for file in files),
            counts=context.counts,
            outcome=context.events.redact(context.outcome),
            run=context.run.name,
            code={**code_revision(), "source": source_hash(planned.step)},
            environment=environment(),
            started=started,
            seconds=seconds,
            cpu_seconds=seconds * topology.cpus,
            gpu_seconds=seconds * topology.gpus,
        )
        with _mid_run():
            return self.store.commit(manifest, _progress(context))


def _progress(context: StepContext[Any]) -> Callable[[str, float, float], None]:
    return lambda phase, done, total: context.progress(phase, done, total, "bytes")


@contextmanager
def _mid_run() -> Iterator[None]:
    """Once a run is under way, trouble with the shared root is no mistake of the user's: a rerun goes on from here."""
    try:
        yield
    except InputError as error:
        raise StepFailed(error.message, error.hint) from error


@contextmanager
def _follow(folder: Path, events: EventLog) -> Iterator[None]:
    """Shows the events of other writers (training workers) to this process's listeners as they appear."""
    tail = EventTail(folder, skip_writer=events.writer)
    done = threading.Event()

    def pump() -> None:
        last = False
        while not last:
            last = done.wait(0.25)
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else ""
