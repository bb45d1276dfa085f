"""Process identity and signals for the supervisor: whether a process is alive, and which service it belongs to.

A process is identified by its pid, the boot id, and its start time in clock ticks since boot. So a reused pid is not
mistaken for it, and changes of the wall clock have no effect. All descendants of a service inherit two environment
variables by which they are found, independent of any state file: one holds the path of MORAY_HOME and the service's
name, the other the folder's device and inode, which stay the same under any path. (A process group is not enough:
Ray's workers and drivers leave the group of `ray start`.)
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
    """The boot id, which changes at every reboot; empty where there is none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def pid_namespace() -> str:
    """Identifies the set of pids that this process sees: containers of one machine have different ones."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot; None if it has ended or is a zombie."""
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
    """A process of this machine. `started` (boot id and start time) distinguishes processes with the same pid."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Returns the live process with this pid, or None."""
        found = started(pid)
        return None if found is None else cls(pid, f"{boot()}:{found}")

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def arguments(self) -> list[str]:
        """Its command line as a list; empty if the process has ended."""
        try:
            return psutil.Process(self.pid).cmdline()
        except psutil.Error:
            return []

    def command(self) -> str:
        """Its command line as one string."""
        return " ".join(self.arguments())

    def send(self, number: int) -> None:
        """Sends a signal; no-op if the process has ended."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def module_folders() -> list[str]:
    """PYTHONPATH as absolute paths, for child processes that may run in another current folder."""
    return [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def marks(folder: Path, service: str) -> dict[str, str]:
    """Environment variables that mark all processes of a service of the MORAY_HOME at `folder`."""
    return {MARK: f"{folder}:{service}", FOLDER_MARK: _identity(folder)}


def marked(folder: Path, service: str) -> list[Process]:
    """Returns every live process that inherited these `marks`, except this one.

    The folder matches by path or by device and inode, because it may be reached through a link or have been renamed.
    """
    name, identity = marks(folder, service).values()
    found = []
    for pid in psutil.pids():
        environment = _environment(pid)
        mark = environment.get(MARK, "")
        same_folder = bool(identity) and environment.get(FOLDER_MARK) == identity and mark.endswith(f":{service}")
        if pid != os.getpid() and (mark == name or same_folder):
            found.append(Process.of(pid))
    return [process for process in found if process is not None]


def _environment(pid: int) -> dict[str, str]:
    """Environment of a process; empty if it has ended, is a zombie, or belongs to another user.

    Parses the whole block: a process that sets its title overwrites the beginning, where psutil stops.
    """
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {} if Path("/proc/self").exists() else _environment_without_proc(pid)
    return _variables(raw)


def _variables(raw: bytes) -> dict[str, str]:
    """Parses /proc/PID/environ, skipping empty and malformed entries."""
    pairs = (part.partition(b"=") for part in raw.split(b"\0") if b"=" in part)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _environment_without_proc(pid: int) -> dict[str, str]:
    try:
        return psutil.Process(pid).environ()
    except psutil.Error:
        return {}


def _identity(folder: Path) -> str:
    """Device and inode of a folder, independent of its path; empty if it does not exist."""
    try:
        found = folder.stat()
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}"


def end(processes: Iterable[Process], seconds: float, wait: Callable[[float], object]) -> None:
    """Sends SIGTERM, waits up to `seconds`, then sends SIGKILL. `wait(seconds)` sleeps."""
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
    """Sends SIGKILL, which also ends stopped processes."""
    for process in processes:
        process.send(signal.SIGKILL)
