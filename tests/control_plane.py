"""A real `moray up` for tests: its own MORAY_HOME and port, the `gate` step on its path, an oracle over its database.

The oracle reads the log of transitions: every accepted job has reached exactly one final state, every attempt too, and
no tick has more than one run.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moray.platform.client import Client
from moray.platform.control.auth import read_token
from moray.platform.control.options import NAMES, UpOptions, url
from moray.platform.control.supervisor import read_state
from moray.platform.control.up import is_up
from moray.platform.core import atomic
from moray.platform.core.home import Home
from moray.platform.core.ports import free_port
from moray.platform.core.processes import Process, kill, marked
from tests import gate_step
from tests.checkout import ROOT

FINAL = ("succeeded", "failed", "cancelled")
T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], what: str, seconds: float = 120.0) -> T:
    """The first true value of `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.05)
    return found


# Read by Python at its start: the controller's wall clock, and nothing else, is off by what the file says.
CLOCK = """
import os, sys, time
if "moray.platform.server.app" in sys.orig_argv and "TEST_CLOCK" in os.environ:
    real = time.time
    def shifted():
        with open(os.environ["TEST_CLOCK"]) as file:
            return real() + float(file.read())
    time.time = shifted
"""


class ControlPlane:
    """One control plane under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "home")
        self.gates = folder / "gates"
        self.gates.mkdir(parents=True)
        self.home.root.mkdir()
        gate_step.install(folder / "packages")
        (folder / "packages" / "sitecustomize.py").write_text(CLOCK)
        self.clock = folder / "clock"
        self.set_clock(0.0)
        self.environment = {**os.environ, "MORAY_HOME": str(self.home.root), "PYTHONPATH": str(folder / "packages")}
        self.environment["TEST_CLOCK"] = str(self.clock)
        self.environment.pop("TRITON_INTERPRET", None)
        self._jobs = 0

    def set_clock(self, seconds: float) -> None:
        """Makes the controller's clock wrong by so much, at once."""
        atomic.write_text(self.clock, str(seconds))

    def cli(self, *arguments: str, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs `moray ARGUMENTS`; fails if it does not end with `code`."""
        done = subprocess.run(
            [sys.executable, str(ROOT / "moray.py"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=cwd or self.gates,
            check=False,
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def up(self, *arguments: str) -> None:
        self.cli("up", "--port", str(free_port()), *arguments)

    def down(self) -> None:
        self.cli("down")

    @property
    def client(self) -> Client:
        return Client(url(UpOptions.read(self.home)), read_token(self.home), lambda: is_up(self.home))

    def recipe(self, key: str = "", **config: Any) -> str:
        """A recipe of one gate, with a key of its own unless one is given."""
        self._jobs += 1
        values = {"folder": str(self.gates), "key": key or f"k{self._jobs}", **config}
        return f"name: gates\nsteps:\n  gate:\n    with: {json.dumps(values)}\n"

    def submit(self, source: str, key: str | None = None, **fields: Any) -> dict[str, Any]:
        body = {"recipe": source, "folder": str(self.gates), **fields}
        return dict(self.client.post("/api/jobs", body, key=key or f"test-{time.monotonic_ns()}"))

    def job(self, job: dict[str, Any]) -> dict[str, Any]:
        return dict(self.client.get(f"/api/jobs/{job['id']}"))

    def wait(self, job: dict[str, Any], *states: str, seconds: float = 180.0) -> dict[str, Any]:
        """The job once it is in one of `states`; fails at once if it has ended otherwise."""

        def look() -> dict[str, Any] | None:
            found = self.job(job)
            assert found["state"] in states or found["state"] not in FINAL, found
            return found if found["state"] in states else None

        return wait_for(look, f"job {job['id']} {'/'.join(states)}", seconds)

    def begun(self, key: str, times: int = 1) -> Process:
        """The driver that works at a gate, once it has begun for the `times`-th time."""

        def look() -> Process | None:
            log = self.gates / f"{key}.begun"
            if not log.exists() or len(log.read_text().split()) < times:
                return None
            return Process.of(int((self.gates / f"{key}.pid").read_text()))

        return wait_for(look, f"gate {key} begun {times} times")

    def open(self, key: str = "") -> None:
        (self.gates / (f"{key}.open" if key else "open")).touch()

    def service(self, name: str) -> Process:
        """The process of a service, once it runs."""

        def look() -> Process | None:
            status = read_state(self.home).get(name)
            alive = status and status.state == "running" and status.process and status.process.alive()
            return status.process if status and alive else None

        return wait_for(look, f"service {name} running")

    def kill_service(self, name: str) -> Process:
        """SIGKILL to a service, for Ray's with all of its own daemons at once; returns the process it was."""
        process = self.service(name)
        family = [p for p in marked(self.home.root, name) if _group(p) == process.pid]
        kill([process, *family])
        return process

    def replaced(self, name: str, old: Process) -> Process:
        """The process that has taken the place of a killed one."""
        return wait_for(lambda: p if (p := self.service(name)) != old else None, f"{name} started again", 180.0)

    def processes(self) -> list[Process]:
        return [process for name in NAMES for process in marked(self.home.root, name)]

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with sqlite3.connect(f"file:{self.home.database}?mode=ro", uri=True, timeout=30) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(query, values).fetchall()

    def prove(self, accepted: list[str]) -> None:
        """The oracle, over all jobs: `accepted` holds the ids that were acknowledged to somebody."""
        jobs = {row["id"]: row["state"] for row in self.rows("SELECT id, state FROM jobs")}
        lost = set(accepted) - set(jobs)
        assert not lost, f"accepted and lost: {lost}"
        for kind, final in (("job", FINAL), ("attempt", (*FINAL, "lost"))):
            query = f"SELECT id, state FROM transitions WHERE kind = ? AND state IN ({', '.join('?' * len(final))})"
            ended = Counter(row["id"] for row in self.rows(query, kind, *final))
            twice = {name: n for name, n in ended.items() if n != 1}
            assert not twice, f"{kind}s that ended more than once: {twice}"
            ids = jobs if kind == "job" else [row["id"] for row in self.rows("SELECT id FROM attempts")]
            open_ = set(ids) - set(ended)
            assert not open_, f"{kind}s that have not ended: {open_}"
        doubled = self.rows("SELECT schedule, tick FROM jobs WHERE tick IS NOT NULL GROUP BY 1, 2 HAVING count(*) > 1")
        assert not doubled, f"ticks with more than one run: {[tuple(row) for row in doubled]}"


def _group(process: Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return -1


def freeze(process: Process) -> None:
    process.send(signal.SIGSTOP)


def thaw(process: Process) -> None:
    process.send(signal.SIGCONT)
