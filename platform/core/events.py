"""Typed events of a run in JSON lines: the single record behind progress, curves, status and usage totals.

Each writer (a process) appends to its own segment under `<run>/events/` and numbers its events from 0. So no two
processes share a file, and (writer, sequence) identifies an event. A partial last line, left by a kill in the middle of
a write, is not an event. A restarted writer opens a new segment.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from moray.platform.core.atomic import is_full
from moray.platform.core.metrics import metric
from moray.platform.core.references import Redactor


class _Event(BaseModel):
    # A value may be NaN; as `null`, pydantic's default, it could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    writer: str = ""
    sequence: int = 0
    time: float = 0.0  # seconds since the epoch


class RunEvent(_Event):
    """A run began or ended."""

    kind: Literal["run"] = "run"
    state: Literal["started", "succeeded", "failed", "cancelled"]
    recipe: str
    detail: str = ""


class StepEvent(_Event):
    """A step changed state; `why` gives the reason for `reused`, `started` and `waiting`."""

    kind: Literal["step"] = "step"
    step: str
    state: Literal["waiting", "started", "reused", "succeeded", "failed", "cancelled"]
    fingerprint: str
    why: str = ""
    seconds: float = 0.0
    counts: dict[str, float] = Field(default_factory=dict)
    outcome: str = ""


class ProgressEvent(_Event):
    """`done` of `total` units of work; `phase` names the part of the step, `detail` is shown beside the bar."""

    kind: Literal["progress"] = "progress"
    step: str
    phase: str
    done: float
    total: float
    unit: str
    detail: str = ""


class MetricEvent(_Event):
    """One value of a metric in `platform/core/metrics.py` (`at`: the training step, or 0)."""

    kind: Literal["metric"] = "metric"
    step: str
    name: str
    value: float
    at: int = 0
    labels: dict[str, str] = Field(default_factory=dict)


class UsageEvent(_Event):
    """Resources a step held: wall seconds, CPU cores and GPUs. `moray runs show` adds these up."""

    kind: Literal["usage"] = "usage"
    step: str
    seconds: float
    cpus: float
    gpus: float
    state: Literal["succeeded", "failed", "cancelled"]


class NoteEvent(_Event):
    """A message for the user: an automatic choice, a recovery, a warning."""

    kind: Literal["note"] = "note"
    step: str
    level: Literal["info", "warning"]
    text: str


class ScoreEvent(_Event):
    """A result of an evaluation, for the page: `metric` on `task`, of `n` items. interval: 95 %; None if unknown."""

    kind: Literal["score"] = "score"
    step: str
    task: str
    metric: str
    value: float
    n: int
    interval: tuple[float, float] | None = None


class ServingEvent(_Event):
    """What a replica of a deployment has done since it started, and what it does now. Each replica writes a segment
    below `deployments/NAME/events/`; counts are cumulative, so its last event has them all.

    version: of the deployment. reference: of the model's artifact. requests: accepted ones that have ended: answered,
    `failed` by the server's fault, or `cancelled` by their clients. refused: invalid ones. seconds: since the start of
    the replica, for which it held `cpus` and `gpus`. running, waiting: sequences now. cache: share of the cache in use.
    first_token: seconds from a request to its first token, median and 95th percentile of the last minute, if there was
    one. tokens_per_second: since the event before. expert_load: by MoE layer, the load of the most loaded expert over
    the mean. cached_tokens: of prompts, in the cache. keys: by name of a key, its requests that have ended, and their
    prompt and completion tokens.
    """

    kind: Literal["serving"] = "serving"
    deployment: str
    version: str
    reference: str
    replica: str
    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cpus: float = 0.0
    gpus: float = 0.0
    running: int = 0
    waiting: int = 0
    cache: float = 0.0
    first_token: tuple[float, float] | None = None
    tokens_per_second: float = 0.0
    expert_load: tuple[float, ...] = ()
    keys: dict[str, tuple[int, int, int]] = {}


Event = RunEvent | StepEvent | ProgressEvent | MetricEvent | UsageEvent | NoteEvent | ScoreEvent | ServingEvent
_FREE_TEXT = ("detail", "why", "outcome", "text")  # fields with text from a step or an error
_BLOCK = 1 << 20  # bytes of a segment read at a time
_adapter: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class EventLog:
    """Appends events to one segment; thread-safe. `listeners` receive each event after it is on disk.

    `redact` is applied to free text from steps, so that no value of a reference is written. If the disk is full, an
    event goes to the listeners only: the code that writes results to that disk raises the error.
    """

    def __init__(self, folder: Path, writer: str, redact: Redactor | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.writer = f"{writer}-{os.getpid()}-{secrets.token_hex(3)}"
        self.redact = redact or Redactor()
        self.listeners: list[Callable[[Event], None]] = []
        self._sequence = 0
        self._lock = threading.Lock()
        self._file = (folder / f"{self.writer}.jsonl").open("ab", buffering=0)

    def append(self, event: Event) -> None:
        """Stamps `event` with writer, sequence and time, writes it in one call, then calls the listeners."""
        if isinstance(event, MetricEvent):
            metric(event.name)
        with self._lock:
            stamped = event.model_copy(
                update={
                    "writer": self.writer,
                    "sequence": self._sequence,
                    "time": time.time(),
                    **self._redacted(event),
                },
            )
            if self._write(stamped.model_dump_json().encode() + b"\n"):
                self._sequence += 1
        for listener in self.listeners:
            listener(stamped)

    def _write(self, line: bytes) -> bool:
        """Returns False if the disk has no space for the whole line; a partial line is truncated."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
        except OSError as error:
            if not is_full(error):
                raise
            return False
        if written < len(line):
            self._file.truncate(end)
        return written == len(line)

    def _redacted(self, event: Event) -> dict[str, Any]:
        fields: dict[str, Any] = {n: self.redact(getattr(event, n)) for n in _FREE_TEXT if hasattr(event, n)}
        if isinstance(event, MetricEvent):
            fields["labels"] = {name: self.redact(value) for name, value in event.labels.items()}
        return fields

    def close(self) -> None:
        self._file.close()


class EventTail:
    """Follows the segments of a run: `poll()` yields the events since the last call.

    `writers` is a glob pattern for segment names.
    """

    def __init__(self, folder: Path, skip_writer: str = "", writers: str = "*") -> None:
        self._folder = folder
        self._pattern = f"{writers}.jsonl"
        self._skip = skip_writer
        self._offsets: dict[Path, int] = {}

    def poll(self) -> Iterator[Event]:
        """Yields new events, segment by segment. Reads only complete lines, because a segment may still be growing."""
        return map(parse_event, self.lines())

    def lines(self) -> Iterator[bytes]:
        """Yields new complete lines, unparsed, segment by segment and block by block, to bound memory for long runs."""
        for path in sorted(self._folder.glob(self._pattern)):
            if self._skip and path.stem == self._skip:
                continue
            with path.open("rb") as file:
                while data := self._block(path, file):
                    yield from data.splitlines()

    def _block(self, path: Path, file: BinaryIO) -> bytes:
        """The next complete lines of a segment, about one block; empty if none is complete yet."""
        offset = file.seek(self._offsets.get(path, 0))
        data = file.read(_BLOCK)
        if len(data) == _BLOCK and b"\n" not in data:
            data += file.readline()
        whole = data[: data.rfind(b"\n") + 1]
        self._offsets[path] = offset + len(whole)
        return whole


def parse_event(line: bytes) -> Event:
    """Parses one line of a segment. Raises ValueError for an event kind this version does not know."""
    return _adapter.validate_json(line)


def read_events(run: Path, writers: str = "*") -> list[Event]:
    """Returns the events of a run folder, ordered by time, writer and sequence. `runner-*` selects the runner's."""
    return sorted(EventTail(run / "events", writers=writers).poll(), key=lambda e: (e.time, e.writer, e.sequence))


def event_json(event: Event) -> dict[str, Any]:
    """The event as a plain dictionary, for `--json` output."""
    return dict(json.loads(event.model_dump_json()))
