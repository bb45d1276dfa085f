"""Processes as the supervisor sees them: who is alive, and which ones belong to a service.

A process is known by its pid, the boot, and the clock tick since then at which it started: so a reused pid is not taken
for it, and no step of the wall clock makes it another. What a service starts, however far down, inherits two variables
of its environment, by which all of it is found again, whatever a file says: the service with the name of its
MORAY_HOME, and which folder that is on disk, by whatever name it is reached. (A process group would not do: Ray's
workers and drivers leave that of `ray start`.)
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "MORAY_SERVICE"
FOLDER_MARK = "MORAY_SERVICE_FOLDER"


def boot() -> str:
    """Distinguishes reboots, after which process ids start anew."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def started(pid: int) -> str | None:
    """When a living process started, in clock ticks since boot; None if it is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self").exists() else _started_without_proc(pid)
    return None if fields[0] in "ZX" else fields[19]


def _started_without_proc(pid: int) -> str | None:
    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else repr(found.create_time())
    except psutil.NoSuchProcess:
        return None


@dataclass(frozen=True)
class Process:
    """A process of this machine: its pid, and what tells it from others that have the same one: boot and start."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process with this pid, or None."""
        found = started(pid)
        return None if found is None else cls(pid, f"{boot()}:{found}")

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def arguments(self) -> list[str]:
        """Its command line; empty if it is gone."""
        try:
            return psutil.Process(self.pid).cmdline()
        except psutil.Error:
            return []

    def command(self) -> str:
        """The same as one text."""
        return " ".join(self.arguments())

    def send(self, number: int) -> None:
        """Sends a signal; nothing if it is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def module_folders() -> list[str]:
    """PYTHONPATH as it is meant here: what is started may have another current folder."""
    return [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def marks(folder: Path, service: str) -> dict[str, str]:
    """The environment of all processes of a service of the MORAY_HOME at `folder`."""
    return {MARK: f"{folder}:{service}", FOLDER_MARK: _identity(folder)}


def marked(folder: Path, service: str) -> list[Process]:
    """Every living process that was started, directly or not, with these `marks`; not this one.

    The folder is known by its name or by its place on disk: it may be reached by a link, or have been renamed.
    """
    name, place = marks(folder, service).values()
    found = []
    for pid in psutil.pids():
        environment = _environment(pid)
        mark = environment.get(MARK, "")
        here = bool(place) and environment.get(FOLDER_MARK) == place and mark.endswith(f":{service}")
        if pid != os.getpid() and (mark == name or here):
            found.append(Process.of(pid))
    return [process for process in found if process is not None]


def _environment(pid: int) -> dict[str, str]:
    """Of a process; empty if it is gone by now, a zombie, or somebody else's.

    All of it is looked at: a process that gives itself a title writes it over the beginning, where psutil stops.
    """
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {} if Path("/proc/self").exists() else _environment_without_proc(pid)
    return _variables(raw)


def _variables(raw: bytes) -> dict[str, str]:
    """What /proc/PID/environ holds, also behind empty entries and what is none."""
    pairs = (part.partition(b"=") for part in raw.split(b"\0") if b"=" in part)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _environment_without_proc(pid: int) -> dict[str, str]:
    try:
        return psutil.Process(pid).environ()
    except psutil.Error:
        return {}


def _identity(folder: Path) -> str:
    """A folder's place on disk, the same by any of its names; empty if it is gone."""
    try:
        found = folder.stat()
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}"


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
