"""A lease on a fingerprint: one process makes the artifact; other processes wait and reuse it.

The lease is a small JSON file whose modification time is its heartbeat. It is stale when its process has ended (same
host) or its heartbeat has stopped (other hosts, by the clock of the file system). A stale lease is taken over under a
file lock, so only one process can take it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moray.platform.core.atomic import write_text
from moray.platform.core.processes import boot, pid_namespace, started

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 30.0


class Waitable(ABC):
    """A lease for which a process can wait."""

    @abstractmethod
    def acquire(self) -> bool:
        """Returns True if this process now holds the lease, False if another live process does, or may do."""

    def wait(self, done: Callable[[], bool], cancelled: Callable[[], bool], poll: float = 0.5) -> bool:
        """Waits until `done()`, or until the lease can be acquired. Returns True if this process now holds it."""
        while not done() and not cancelled():
            if self.acquire():
                return True
            time.sleep(poll)
        return False


class Lease(Waitable):
    """A lease, held from a successful `acquire` to `release`; a thread updates its heartbeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            if self.path.exists() and not is_stale(self.path):
                return False
            write_text(self.path, json.dumps(_self()))
        self._thread = threading.Thread(target=self._beat, name="lease heartbeat", daemon=True)
        self._thread.start()
        return True

    def holder(self) -> dict[str, Any]:
        """Returns the holder's host and pid, for messages; empty if there is none."""
        try:
            return _read(self.path)
        except FileNotFoundError:
            return {}

    def release(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the disk may be full or unavailable; the next beat retries
                os.utime(self.path)


def is_stale(path: Path) -> bool:
    """Whether the holder has ended. An unreadable lease is judged by its age alone."""
    try:
        modified = path.stat().st_mtime
        holder = _read(path)
    except FileNotFoundError:
        return True
    here = _self()
    same_host = all(holder.get(name, here[name]) == here[name] for name in ("host", "boot", "pids"))
    if same_host and isinstance(pid := holder.get("pid"), int):
        return bool(started(pid) != holder.get("process_started"))
    return _file_time(path.parent) - modified > STALE_SECONDS


def _file_time(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder. On a file server, it is not this machine's."""
    path = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
    try:
        path.touch()
        return path.stat().st_mtime
    except OSError:  # a read-only file system
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process with this pid is alive on this host."""
    return started(pid) is not None


def _read(path: Path) -> dict[str, Any]:
    """Parses a lease file; empty if it is malformed."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": boot(),
        "pids": pid_namespace(),
        "pid": pid,
        "process_started": started(pid),
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
