"""Counts a replica's requests and reports them, with what the engine does now, as events (`ServingEvent`)."""

from __future__ import annotations

import asyncio
import logging
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from prometheus_client.metrics_core import Metric

from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.async_engine import AsyncEngine, EngineStoppedError
from moray.pipelines.serve.grammar import GrammarError
from moray.pipelines.serve.metrics import ReplicaMetrics
from moray.pipelines.serve.sequence import Delta
from moray.platform.core.events import EventLog, ServingEvent
from moray.platform.core.serving import ServedModel
from moray.platform.store.paths import any_path
from moray.platform.store.segments import event_log

_log = logging.getLogger(__name__)
REPORT_SECONDS = 2.0
_RETRY_SECONDS = 30.0  # after an error of the disk or the store
_IDLE_SECONDS = 60.0  # between reports of a replica that has nothing to do
_RECENT_SECONDS = 60.0  # for the times to the first token
_MOST_RECENT = 1000


class RequestTally:
    """One accepted request: a context manager around its answer, to which the answer's deltas are added.

    key: the name of its key. ended: called with the number of generated tokens, or None if another replica answers.
    """

    def __init__(
        self,
        report: ServingReport,
        prompt_tokens: int,
        key: str = "",
        ended: Callable[[int | None], None] | None = None,
    ) -> None:
        self._report, self._prompt_tokens, self._key, self._ended = report, prompt_tokens, key, ended
        self._began = time.monotonic()
        self._generated: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._first: float | None = None  # seconds to the first token
        self._entered = False

    def add(self, deltas: Iterable[tuple[int, Delta]]) -> None:
        """Counts new tokens, by index of the prompt."""
        first = not self._generated
        tokens = 0
        for index, delta in deltas:
            tokens += max(0, delta.generated - self._generated.get(index, 0))
            self._generated[index] = max(delta.generated, self._generated.get(index, 0))
            self._cached[index] = delta.cached
        if first and self._generated:
            self._first = time.monotonic() - self._began
        self._report.add_tokens(tokens, self._first if first else None)

    def leave(self) -> None:
        """Ends it as cancelled, unless its answer has begun."""
        if not self._entered:
            self.__exit__(None, asyncio.CancelledError(), None)

    def __enter__(self) -> RequestTally:
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        elsewhere = isinstance(error, EngineStoppedError)  # another replica answers
        generated = sum(self._generated.values())
        if self._ended is not None:
            self._ended(None if elsewhere else generated)
        if elsewhere:
            return
        gone = isinstance(error, (asyncio.CancelledError, GeneratorExit)) or (
            isinstance(error, ApiError) and error.status == 499
        )
        failed = error is not None and not gone and not isinstance(error, GrammarError)
        self._report.end(self._prompt_tokens, self._cached.get(0, 0), failed=failed, cancelled=gone)
        self._report.metrics.observe(self._first, self._per_token())
        if self._key:
            self._report.use(self._key, self._prompt_tokens, generated)

    def _per_token(self) -> float | None:
        """Seconds between the tokens of an answer, on average over its choices."""
        most = max(self._generated.values(), default=0)
        if self._first is None or most < 2:
            return None
        return (time.monotonic() - self._began - self._first) / (most - 1)


class ServingReport:
    """The counts of one replica. `start` begins to write them to `model.events`, if that is set."""

    def __init__(self, model: ServedModel, engine: AsyncEngine, replica: str) -> None:
        self._model, self._engine, self._replica = model, engine, replica
        self.metrics = ReplicaMetrics(model.name, replica)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()  # by field of ServingEvent
        self._keys: dict[str, tuple[int, int, int]] = {}
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_MOST_RECENT)
        self._began = time.monotonic()
        self._last: ServingEvent | None = None
        self._last_time = self._began
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write, name="report", daemon=True)

    def start(self) -> None:
        if self._model.events:
            self._thread.start()

    def close(self) -> None:
        """Writes the last counts."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def request(
        self, prompt_tokens: int, key: str = "", ended: Callable[[int | None], None] | None = None
    ) -> RequestTally:
        """Begins to count a request."""
        return RequestTally(self, prompt_tokens, key, ended)

    def refuse(self) -> None:
        """Counts an invalid request."""
        with self._lock:
            self._counts["refused"] += 1

    def add_tokens(self, tokens: int, first: float | None) -> None:
        """first: seconds to the first token, if these are the first ones of a request."""
        with self._lock:
            self._counts["completion_tokens"] += tokens
            if first is not None:
                self._first_tokens.append((time.monotonic(), first))

    def end(self, prompt_tokens: int, cached_tokens: int, failed: bool, cancelled: bool) -> None:
        """Counts the end of a request."""
        with self._lock:
            ended = {"requests": 1, "prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens}
            ended |= {"failed": int(failed), "cancelled": int(cancelled)}
            self._counts.update(ended)

    def use(self, key: str, prompt_tokens: int, generated: int) -> None:
        """Counts a request of a key that has ended."""
        with self._lock:
            before = self._keys.get(key, (0, 0, 0))
            self._keys[key] = (before[0] + 1, before[1] + prompt_tokens, before[2] + generated)

    def collect(self) -> list[Metric]:
        """All metrics of the replica."""
        return self.metrics.collect(self.event())

    def event(self) -> ServingEvent:
        """The counts until now, and the state of the engine."""
        now = time.monotonic()
        with self._lock:
            counts, keys = dict(self._counts), dict(self._keys)
            recent = [seconds for at, seconds in self._first_tokens if now - at <= _RECENT_SECONDS]
        before = self._last.completion_tokens if self._last else 0
        rate = (counts.get("completion_tokens", 0) - before) / max(now - self._last_time, 1e-3)
        return ServingEvent(
            deployment=self._model.name,
            version=self._model.version,
            reference=self._model.reference,
            replica=self._replica,
            seconds=round(now - self._began, 3),
            cpus=self._model.resources.get("num_cpus", 0.0),
            gpus=self._model.resources.get("num_gpus", 0.0),
            first_token=_percentiles(recent),
            tokens_per_second=round(rate, 3),
            keys=keys,
            **counts,
            **self._engine.state(),
        )

    def _write(self) -> None:
        """Reports until the end. Counts are cumulative, so what a full disk or a store refuses now is said later."""
        while not self._end.is_set():
            try:
                self._write_events()
            except Exception as error:
                _log.warning("the requests are not reported: %s: %s", type(error).__name__, error)
                self._end.wait(_RETRY_SECONDS)

    def _write_events(self) -> None:
        with event_log(any_path(self._model.events) / "events", f"replica-{self._replica}") as log:
            while not self._end.wait(REPORT_SECONDS):
                self._report(log)
            self._report(log, last=True)

    def _report(self, log: EventLog, last: bool = False) -> None:
        event = self.event()
        if not last and self._is_old(event):
            return
        log.append(event)
        self._last, self._last_time = event, time.monotonic()

    def _is_old(self, event: ServingEvent) -> bool:
        """Whether the event says nothing new, and the last one is recent."""
        changes = {"seconds"}
        same = self._last is not None and event.model_dump(exclude=changes) == self._last.model_dump(exclude=changes)
        return same and time.monotonic() - self._last_time < _IDLE_SECONDS


def _percentiles(values: list[float]) -> tuple[float, float] | None:
    """Median and 95th percentile."""
    if not values:
        return None
    ordered = sorted(values)
    return round(statistics.median(ordered), 4), round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 4)


def replica_id() -> str:
    """The id of the Serve replica in this process."""
    from ray import serve

    context: Any = serve.get_replica_context()
    return str(context.replica_id.unique_id)
