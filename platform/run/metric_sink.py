"""What receives the metrics of a run while it runs, and the thread that feeds it.

A sink may be slow, fail or hang. It has a thread and a queue of its own, so that the run never waits for it. After an
error, the run continues without the sink, with one warning.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moray.platform.core.events import MetricEvent

STEPPED = "train_loss"  # the metric of every training step: if it goes back, training has resumed from a checkpoint
_WAITING = 100_000  # events, about 50 MB; a sink that is further behind is given up
_FLUSH_SECONDS = 2.0


@dataclass(frozen=True)
class TrackedStep:
    """A step of a run. Its curves are identified by recipe, key and fingerprint, so a run that resumes the step goes on
    with them."""

    recipe: str
    key: str
    fingerprint: str
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)


class MetricSink(ABC):
    """Used by one thread. Every method may raise any error, which ends the sink."""

    title: str

    @abstractmethod
    def write(self, step: TrackedStep, event: MetricEvent) -> None:
        """Adds a value to a curve."""

    @abstractmethod
    def flush(self) -> None:
        """Makes what was written visible. Called every few seconds."""

    @abstractmethod
    def close(self) -> None:
        """Called once, after the last value; not after an error."""


def curve_name(event: MetricEvent) -> str:
    """The name of a curve: the metric's, and its labels."""
    return "/".join([event.name, *(f"{name}-{value}" for name, value in sorted(event.labels.items()))])


class SinkThread:
    """Feeds one sink. warn: is called at most once, from this thread or the run's."""

    def __init__(self, sink: MetricSink, warn: Callable[[str], None]) -> None:
        self.title = sink.title
        self._sink, self._warn = sink, warn
        self._queue: queue.Queue[tuple[TrackedStep, MetricEvent]] = queue.Queue(_WAITING)
        self._closing, self._failed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        # A daemon: a sink that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"sink {sink.title}", daemon=True)
        self._thread.start()

    def put(self, step: TrackedStep, event: MetricEvent) -> None:
        """Never waits."""
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait((step, event))
        except queue.Full:
            self._fail(f"it is {_WAITING:,} values behind")

    def close(self, seconds: float) -> bool:
        """Lets the sink finish; False if it has not after so many seconds."""
        self._closing.set()
        self._thread.join(seconds)
        return not self._thread.is_alive() or self._failed.is_set()

    def abandon(self) -> None:
        """Says no more about the sink, whatever becomes of it."""
        self._failed.set()

    def _run(self) -> None:
        try:
            flushed = time.monotonic()
            while not (self._closing.is_set() and self._queue.empty()):
                if self._failed.is_set():
                    return
                with contextlib.suppress(queue.Empty):
                    self._sink.write(*self._queue.get(timeout=0.1))
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    self._sink.flush()
                    flushed = time.monotonic()
            self._sink.flush()
            self._sink.close()
        except Exception as error:  # of another library, or of a network
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._failed.is_set():
                return
            self._failed.set()
        self._warn(f"{self.title} gets no more metrics: {reason}; the run goes on without it")
