"""The state of a run for the page, built from its events: DAG with step states, progress, curves, expert load.

`RunViews` caches the events already read of each run, so a poll reads only new events. Events of several writers
arrive segment by segment, not in time order, so every latest value is chosen by time. Missing data and events of other
versions raise no errors; the view contains everything that could be read.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from moray.platform.control.jobs import ATTEMPT_ENDED, Attempt, Job
from moray.platform.core.events import (
    EventTail,
    MetricEvent,
    NoteEvent,
    ProgressEvent,
    RunEvent,
    ScoreEvent,
    StepEvent,
    parse_event,
)
from moray.platform.core.home import Home
from moray.platform.core.metrics import TABLE, describe
from moray.platform.plan.recipe import listed_steps
from moray.platform.run.terminal import Rate
from moray.platform.server.curves import Curve, LoadMap, short

_Key = tuple[str, tuple[str, ...], str]  # of a metric: its name, its labels' values, its step
EXPERT_LOAD = "train_expert_load"
FIRST_CURVES = ("train_loss", "train_tokens_per_second")
_RUNNING = ("waiting", "started")
_MOST_RUNS = 32  # kept in memory; other runs are read again on request
_MOST_NOTES, _MOST_SCORES = 200, 500  # of a step
_listed = lru_cache(maxsize=_MOST_RUNS)(listed_steps)  # cached, because every poll needs the same recipe


@dataclass
class _Step:
    """State of one step, collected from its events. `began`: time of its last start. `last`: time of its last event."""

    state: StepEvent | None = None
    began: float = 0.0
    why: str = ""
    progress: ProgressEvent | None = None
    rate: Rate = field(default_factory=Rate)
    notes: list[NoteEvent] = field(default_factory=list)
    scores: dict[tuple[str, str], ScoreEvent] = field(default_factory=dict)  # by task and metric
    last: float = 0.0

    def add(self, event: StepEvent | ProgressEvent | NoteEvent | ScoreEvent) -> None:
        self.last = max(self.last, event.time)
        match event:
            case StepEvent() if self.state is None or event.time >= self.state.time:
                self.state = event
                self.why = event.why or self.why
                if event.state in _RUNNING:
                    self.began = event.time
            case ProgressEvent() if self.progress is None or event.time >= self.progress.time:
                if self.progress is None or event.phase != self.progress.phase:
                    self.rate = Rate()
                self.rate.add(event.time, event.done)
                self.progress = event
            case NoteEvent() if len(self.notes) < _MOST_NOTES:
                self.notes.append(event)
            case ScoreEvent() if len(self.scores) < _MOST_SCORES:
                self.scores[event.task, event.metric] = event
            case _:
                pass

    def as_json(self, key: str, uses: str, inputs: Mapping[str, str], over: bool) -> dict[str, Any]:
        """`over`: the attempt has ended, so a step whose last state is `started` or `waiting` is lost."""
        event = self.state
        state = event.state if event else "pending"
        lost = over and state in _RUNNING
        return {
            "key": key,
            "uses": uses,
            "inputs": dict(inputs),
            "state": "lost" if lost else state,
            "why": self.why,
            "fingerprint": event.fingerprint if event else "",
            "began": self.began or None,
            "seconds": max(0.0, self.last - self.began) if state in _RUNNING else event.seconds if event else 0.0,
            "outcome": event.outcome if event else "",
            "counts": {name: short(value) for name, value in event.counts.items()} if event else {},
            "notes": [
                {"time": note.time, "level": note.level, "text": note.text}
                for note in sorted(self.notes, key=lambda note: note.time)
            ],
            "scores": [
                {name: getattr(score, name) for name in ("task", "metric", "value", "n", "interval")}
                for score in self.scores.values()
            ],
            "progress": self._progress() if state in _RUNNING and not lost else None,
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
    """One run folder: the state collected from the events read so far."""

    def __init__(self, home: Home, attempt: str) -> None:
        self.lock = threading.Lock()
        self._tail = EventTail(home.runs / attempt / "events")
        self._began: RunEvent | None = None
        self._ended: RunEvent | None = None
        self._last = 0.0
        self._unreadable = 0
        self._steps: dict[str, _Step] = {}
        self._curves: dict[_Key, Curve] = {}
        self._loads: dict[str, LoadMap] = {}
        self._figures: dict[_Key, MetricEvent] = {}

    def refresh(self) -> None:
        for line in self._tail.lines():
            try:
                event = parse_event(line)
            except ValueError:  # a torn line, or an event of another version
                self._unreadable += 1
                continue
            self._last = max(self._last, event.time)
            match event:
                case RunEvent(state="started"):
                    self._began = event
                case RunEvent():
                    self._ended = event
                case StepEvent() | ProgressEvent() | NoteEvent() | ScoreEvent():
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
        curve_names, figure_names = _names(self._curves), _names(self._figures)
        curves = {name.path: self._curves[key].points() for key, name in curve_names.items()}
        figures = {name.path: short(self._figures[key].value) for key, name in figure_names.items()}
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
                row.name: {"label": row.label, "unit": row.unit, "help": row.help, "digits": row.digits}
                for row in map(describe, sorted({key[0] for key in (*self._curves, *self._figures)}))
            },
            "titles": {name.path: name.title for name in (*curve_names.values(), *figure_names.values())},
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
        """The steps in the recipe's order, followed by steps that only appear in events."""
        planned = _listed(job.source)
        planned = {**planned, **{key: (key, {}) for key in self._steps if key not in planned}}
        return [
            self._steps.get(key, _Step()).as_json(key, uses, inputs, over) for key, (uses, inputs) in planned.items()
        ]


class RunViews:
    """Cache of recently viewed runs. Thread-safe."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._lock = threading.Lock()

    def view(self, job: Job, attempt: str | None = None) -> dict[str, Any]:
        """The run of an attempt of `job`, by default the latest, as documented in docs/http-api.md.

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
        """Summary of a running job for a list: {"done", "steps", "step", "progress"}."""
        steps = self.view(job)["steps"]
        current = next((step for step in steps if step["state"] in _RUNNING), None)
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
    """The view of a run without caching."""
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
        "titles": {},
        "curves": {},
        "figures": {},
        "expert_load": None,
    }


class _Name(NamedTuple):
    """path: key in the JSON, `metric/label/label`. title: the same for people, `Label (label, label)`."""

    path: str
    title: str


def _names(keys: Collection[_Key]) -> dict[_Key, _Name]:
    """Names metrics; the step is appended where several steps report the same metric."""
    steps: dict[str, set[str]] = {}
    for metric, _, step in keys:
        steps.setdefault(metric, set()).add(step)
    return {
        (metric, labels, step): _Name(
            "/".join([metric, *labels, *([step] if len(steps[metric]) > 1 else [])]),
            describe(metric).title(labels) + (f" · {step}" if len(steps[metric]) > 1 else ""),
        )
        for metric, labels, step in keys
    }


def _rank(curve: str) -> tuple[int, str]:
    """Sort key: loss and throughput first, then the order of the table of metrics."""
    name = curve.partition("/")[0]
    order: Iterable[str] = (*FIRST_CURVES, *(row for row in TABLE if row not in FIRST_CURVES))
    return next((i for i, known in enumerate(order) if known == name), len(TABLE)), curve
