"""Commands that take turns on a machine: one runs with its child processes while the others are stopped.

For comparing long runs that differ by a few percent on a machine whose speed varies by tens of percent from one minute
to the next. Turns only seconds apart run under the same machine conditions.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Turn:
    """`began`, `ended`: seconds since the epoch. `cores`: CPU time over wall time per process, in descending order."""

    began: float
    ended: float
    cores: list[float]


class Contestant:
    """A command and its child processes. It starts at once, and is stopped after `until` and after every `turn`."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._root = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        self.turns: list[Turn] = []

    def until(self, ready: Callable[[], bool], seconds: float = 180) -> None:
        """Runs it until it is ready. Raises RuntimeError with the end of its log if it exits or exceeds `seconds`."""
        last = time.monotonic() + seconds
        while not ready():
            if self._root.poll() is not None or time.monotonic() > last:
                raise RuntimeError(f"{' '.join(self._root.args)}:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.3)
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        before, began = self._used(), time.time()
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        ended, after = time.time(), self._used()
        used = [(spent - before.get(pid, 0.0)) / (ended - began) for pid, spent in after.items()]
        self.turns.append(Turn(began, ended, sorted(used, reverse=True)))

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._root.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Sends a signal to all of its processes, including any that start in the meantime."""
        told: set[psutil.Process] = set()
        while new := set(self._processes()) - told:
            for process in new:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            told |= new

    def _used(self) -> dict[int, float]:
        """CPU-seconds used so far, by process id."""
        found = {}
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found

    def _processes(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield from [psutil.Process(self._root.pid), *self._root.children(recursive=True)]
