"""Processes as the supervisor sees them: who is alive, and which ones belong to a service.

A process is known by its pid and start time, so that a reused pid is not taken for it. What a service starts, however
far down, inherits a variable of its environment, by which all of it is found again: Ray's workers and drivers leave the
process group of `ray start`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

MARK = "MORAY_SERVICE"


@dataclass(frozen=True)
class Process:
    """A process of this machine: its pid and when it started (seconds since the epoch, as psutil tells it)."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process with this pid, or None."""
        try:
            found = psutil.Process(pid)
            if found.status() == psutil.STATUS_ZOMBIE:
                return None
            return cls(pid, found.create_time())
        except psutil.NoSuchProcess:
            return None

    def alive(self) -> bool:
        now = Process.of(self.pid)
        return now is not None and abs(now.started - self.started) < 1.0

    def command(self) -> str:
        """Its command line; empty if it is gone."""
        try:
            return " ".join(psutil.Process(self.pid).cmdline())
        except psutil.Error:
            return ""

    def send(self, number: int) -> None:
        """Sends a signal; nothing if it is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def marked(mark: str) -> list[Process]:
    """Every living process that was started, directly or not, with `mark` in its environment; not this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(Process.of(process.pid))
        except psutil.Error:
            continue  # gone by now, a zombie, or somebody else's
    return [process for process in found if process is not None]


def end(processes: Iterable[Process], seconds: float, wait: Callable[[float], object]) -> None:
    """SIGTERM, up to `seconds` of patience, then SIGKILL. `wait(seconds)` sleeps."""
    left = [process for process in processes if process.alive()]
    for process in left:
        process.send(signal.SIGTERM)
    waited = 0.0
    while left and waited < seconds:
        wait(0.1)
        waited += 0.1
        left = [process for process in left if process.alive()]
    kill(left)


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL, also to what was stopped."""
    for process in processes:
        process.send(signal.SIGKILL)
