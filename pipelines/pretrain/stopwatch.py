"""Time of exposed communication: communication during which a rank computes nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moray.kernels.util.device import Event, runtime


class Stopwatch:
    """Sums the time spent in its `over` blocks: host time for CPU work, stream time for GPU work."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._taken = 0.0
        self._spans: deque[tuple[Event, Event]] = deque()  # whose time is not in `_seconds` yet

    @contextmanager
    def over(self, device: torch.device) -> Iterator[None]:
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

    def total(self) -> float:
        """Seconds of all blocks that the device has finished. Does not wait for the device."""
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
        return self._seconds

    def take(self) -> float:
        """Seconds since the last call, of all blocks. Waits for the device."""
        for _, end in self._spans:
            end.synchronize()
        total = self.total()
        seconds, self._taken = total - self._taken, total
        return seconds
