"""Time of exposed communication: communication during which a rank computes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moray.kernels.util.device import Event, runtime


class Stopwatch:
    """Sums the time spent in its `over` blocks: host time for CPU work, stream time for GPU work.

    on: False disables it, so that events do not pile up on ranks that report nothing.
    """

    def __init__(self, on: bool = True) -> None:
        self._on = on
        self._seconds = 0.0
        self._spans: list[tuple[Event, Event]] = []

    @contextmanager
    def over(self, device: torch.device) -> Iterator[None]:
        if not self._on:
            yield
            return
        if device.type == "cpu":
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - began
            return
        begin, end = (runtime(device).event() for _ in range(2))
        begin.record()
        yield
        end.record()
        self._spans.append((begin, end))

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = self._seconds
        for begin, end in self._spans:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1e3
        self._seconds, self._spans = 0.0, []
        return seconds
