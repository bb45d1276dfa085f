"""A run as the page shows it: the recipe's DAG with live states, progress, curves, expert load. Read from its events.

`RunViews` keeps what it has read of each run, so a poll costs only what was written since. Events of several writers
arrive segment by segment, not in the order of time; whatever keeps a latest value therefore compares times. Nothing
here raises for what a run has not, not yet, or in a form that another version wrote: the view says what is known.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from moray.platform.control.jobs import ATTEMPT_ENDED, Attempt, Job
from moray.platform.core.events import (
    EventTail,
    MetricEvent,
    NoteEvent,
    ProgressEvent,
    RunEvent,
    StepEvent,
    parse_event,
)
from moray.platform.core.home import Home
from moray.platform.core.metrics import TABLE
from moray.platform.plan.recipe import listed_steps
from moray.platform.run.terminal import Rate
from moray.platform.server.curves import Curve, LoadMap, short

EXPERT_LOAD = "train_expert_load"
FIRST_CURVES = ("train_loss", "train_tokens_per_second")
_AT_WORK = ("waiting", "started")
_MOST_RUNS = 32  # that are kept in memory; the others are read anew when they are asked for
_MOST_NOTES = 200
_listed = lru_cache(maxsize=_MOST_RUNS)(listed_steps)  # every poll asks for the same recipe


@dataclass
class _Step:
    """What the events say of one step. `changed` is the time of its last state, `began` of its last start."""

    state: StepEvent | None = None
    began: float = 0.0
    why: str = ""
    progress: ProgressEvent | None = None
    rate: Rate = field(default_factory=Rate)
    notes: list[NoteEvent] = field(default_factory=list)
    last: float = 0.0  # when it last said anything

    def add(self, event: StepEvent | ProgressEvent | NoteEvent) -> None:
        self.last = max(self.last, event.time)
        match event:
            case StepEvent() if self.state is None or event.time >= self.state.time:
                self.state = event
                self.why = event.why or self.why
                if event.state in _AT_WORK:
                    self.began = event.time
            case ProgressEvent() if self.progress is None or event.time >= self.progress.time:
                if self.progress is None or event.phase != self.progress.phase:
                    self.rate = Rate()
                self.rate.add(event.time, event.done)
                self.progress = event
            case NoteEvent() if len(self.notes) < _MOST_NOTES:
                self.notes.append(event)
            case _:
                pass

    def as_json(self, key: str, uses: str, inputs: Mapping[str, str], over: bool) -> dict[str, Any]:
        """`over`: its attempt has ended, so it is not at work any more, whatever its last event says."""
        event = self.state
        state = event.state if event else "pending"
        lost = over and state in _AT_WORK
        return {
            "key": key,
            "uses": uses,
            "inputs": dict(inputs),
            "state": "lost" if lost else state,
            "why": self.why,
            "fingerprint": event.fingerprint if event else "",
            "began": self.began or None,
            "seconds": max(0.0, self.last - self.began) if state in _AT_WORK else event.seconds if event else 0.0,
            "outcome": event.outcome if event else "",
            "counts": {name: short(value) for name, value in event.counts.items()} if event else {},
            "notes": [
                {"time": note.time, "level": note.level, "text": note.text}
                for note in sorted(self.notes, key=lambda note: note.time)
            ],
            "progress": self._progress() if state in _AT_WORK and not lost else None,
        }

    def _progress(self) -> dict[str, Any] | None:
        event = self.progress
        if event is None or event.time < self.began:
            return None
        rate = self.rate.per_second() or None
        eta = (event.total - event.done) / rate if rate and event.total >= event.done else None
        shown = {name: getattr(event, name) for name in ("phase", "done", "total", "unit", "detail")}
        return {**shown, "rate": rate, "eta": eta}


class _Run:
    """One run folder, as far as it was read."""

    def __init__(self, home: Home, attempt: str) -> None:
        self.lock = threading.Lock()
        self._tail = EventTail(home.runs / attempt / "events")
        self._began: RunEvent | None = None
        self._ended: RunEvent | None = None
        self._last = 0.0
        self._unreadable = 0
        self._steps: dict[str, _Step] = {}
        self._curves: dict[tuple[str, tuple[str, ...], str], Curve] = {}
        self._loads: dict[str, LoadMap] = {}
        self._figures: dict[tuple[str, tuple[str, ...], str], MetricEvent] = {}

    def refresh(self) -> None:
        for line in self._tail.lines():
            try:
                event = parse_event(line)
            except ValueError:  # a torn line in the middle, or a schema that is not ours
                self._unreadable += 1
                continue
            self._last = max(self._last, event.time)
            match event:
                case RunEvent(state="started"):
                    self._began = event
                case RunEvent():
                    self._ended = event
                case StepEvent() | ProgressEvent() | NoteEvent():
                    self._steps.setdefault(event.step, _Step()).add(event)
                case MetricEvent():
                    self._metric(event)
                case _:
                    pass

    def _metric(self, event: MetricEvent) -> None:
        labels = tuple(value for _, value in sorted(event.labels.items()))
        key = (event.name, labels, event.step)
        if event.name == EXPERT_LOAD:
            self._loads.setdefault(event.step, LoadMap()).add(event)
        elif event.at > 0:
            self._curves.setdefault(key, Curve()).add(event.at, event.value, event.time)
        elif key not in self._figures or event.time >= self._figures[key].time:
            self._figures[key] = event

    def view(self, job: Job, attempt: Attempt) -> dict[str, Any]:
        over = attempt.state in ATTEMPT_ENDED
        began = self._began.time if self._began else attempt.started
        curves = {name: curve.points() for name, curve in _named(self._curves).items()}
        figures = {name: short(event.value) for name, event in _named(self._figures).items()}
        loads = max(self._loads.values(), key=lambda found: found.last, default=None)
        return {
            "now": time.time(),
            "job": job.as_json(),
            "attempt": attempt.id,
            "state": self._state(attempt),
            "started": began,
            "seconds": max(0.0, self._last - began) if began and self._last else 0.0,
            "detail": (self._ended.detail if self._ended else "") or attempt.detail,
            "unreadable": self._unreadable,
            "steps": self._all_steps(job, over),
            "metrics": {
                name: {"unit": row.unit, "help": row.help, "digits": row.digits}
                for name, row in TABLE.items()
                if any(key.partition("/")[0] == name for key in (*curves, *figures))
            },
            "curves": dict(sorted(curves.items(), key=lambda item: _rank(item[0]))),
            "figures": figures,
            "expert_load": loads.as_json() if loads else None,
        }

    def _state(self, attempt: Attempt) -> str:
        if self._ended:
            return self._ended.state
        if attempt.state in ATTEMPT_ENDED:
            return attempt.state
        return "started" if self._began else "pending"

    def _all_steps(self, job: Job, over: bool) -> list[dict[str, Any]]:
        """The recipe's steps in its order, then any that only the events know."""
        planned = _listed(job.source)
        planned = {**planned, **{key: (key, {}) for key in self._steps if key not in planned}}
        return [
            self._steps.get(key, _Step()).as_json(key, uses, inputs, over) for key, (uses, inputs) in planned.items()
        ]


class RunViews:
    """The runs that were looked at lately; may be used by several threads."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._lock = threading.Lock()

    def view(self, job: Job, attempt: str | None = None) -> dict[str, Any]:
        """The run of an attempt of `job`, by default the latest, as docs/http-api.md shows it.

        Raises KeyError if the job has no such attempt.
        """
        if attempt is None and job.latest is None:
            return _not_begun(job)
        chosen = job.latest if attempt is None else next((a for a in job.attempts if a.id == attempt), None)
        if chosen is None:
            raise KeyError(attempt)
        run = self._run(chosen.id)
        with run.lock:
            run.refresh()
            return run.view(job, chosen)

    def brief(self, job: Job) -> dict[str, Any]:
        """Where a job is, in a few words, for a list: {"done", "steps", "step", "progress"}."""
        steps = self.view(job)["steps"]
        current = next((step for step in steps if step["state"] in _AT_WORK), None)
        return {
            "done": sum(step["state"] in ("succeeded", "reused") for step in steps),
            "steps": len(steps),
            "step": current["key"] if current else "",
            "progress": current["progress"] if current else None,
        }

    def _run(self, attempt: str) -> _Run:
        with self._lock:
            run = self._runs.setdefault(attempt, _Run(self._home, attempt))
            self._runs.move_to_end(attempt)
            while len(self._runs) > _MOST_RUNS:
                self._runs.popitem(last=False)
            return run


def run_view(home: Home, job: Job, attempt: str | None = None) -> dict[str, Any]:
    """One look at a run, with nothing kept."""
    return RunViews(home).view(job, attempt)


def _not_begun(job: Job) -> dict[str, Any]:
    steps = [_Step().as_json(key, uses, inputs, False) for key, (uses, inputs) in _listed(job.source).items()]
    return {
        "now": time.time(),
        "job": job.as_json(),
        "attempt": None,
        "state": "pending",
        "started": None,
        "seconds": 0.0,
        "detail": "",
        "unreadable": 0,
        "steps": steps,
        "metrics": {},
        "curves": {},
        "figures": {},
        "expert_load": None,
    }


def _named(found: Mapping[tuple[str, tuple[str, ...], str], Any]) -> dict[str, Any]:
    """name/label/label, with the step behind it where several steps report the same figure."""
    steps: dict[str, set[str]] = {}
    for name, _, step in found:
        steps.setdefault(name, set()).add(step)
    return {
        "/".join([name, *labels, *([step] if len(steps[name]) > 1 else [])]): value
        for (name, labels, step), value in found.items()
    }


def _rank(curve: str) -> tuple[int, str]:
    """Loss and throughput first, then the order of the table."""
    name = curve.partition("/")[0]
    order: Iterable[str] = (*FIRST_CURVES, *(row for row in TABLE if row not in FIRST_CURVES))
    return next((i for i, known in enumerate(order) if known == name), len(TABLE)), curve
