"""A lease on a fingerprint in work: one process makes the artifact, rivals wait for it and reuse it.

The lease is a small JSON file whose modification time is its heartbeat. It is stale when its process is gone (same
host) or its heartbeat is (any host); taking over a stale one happens under a file lock, so two rivals cannot both.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moray.platform.atomic import write_text

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 30.0


class Lease:
    """Held between a successful `acquire` and `release`; a thread keeps its heartbeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """True if this process now holds the lease, False if a live rival does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            if self.path.exists() and not is_stale(self.path):
                return False
            write_text(self.path, json.dumps(_self()))
        self._thread = threading.Thread(target=self._beat, name="lease heartbeat", daemon=True)
        self._thread.start()
        return True

    def wait(self, done: Callable[[], bool], cancelled: Callable[[], bool], poll: float = 0.5) -> bool:
        """Waits until `done()`, or until the lease can be taken. Returns True if this process now holds it."""
        while not done() and not cancelled():
            if self.acquire():
                return True
            time.sleep(poll)
        return False

    def release(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            os.utime(self.path)


def is_stale(path: Path) -> bool:
    """Whether the holder is gone. An unreadable lease counts by its age alone."""
    try:
        age = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except ValueError:
        holder = {}
    if holder.get("host") == socket.gethostname() and holder.get("boot") == boot():
        return bool(_started(int(holder["pid"])) != holder.get("process_started"))
    return age > STALE_SECONDS


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    return _started(pid) is not None


def holder(path: Path) -> dict[str, Any]:
    """Who holds the lease, for messages; empty if nobody does."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot(), "pid": pid, "process_started": _started(pid)}


def boot() -> str:
    """Distinguishes reboots, after which process ids start anew."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _started(pid: int) -> str | None:
    """Start time of a living process (so that a reused pid is not taken for the old one), None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
        return _started_without_proc(pid)
    return None if fields[0] == "Z" else fields[19]


def _started_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # alive, and somebody else's
    return "unknown"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
