"""Keeps services running: starts them in order, restarts what dies, adopts what a dead supervisor left alive.

What it knows stands in `up/state.json`, written at every change: for `moray status`, for the page, and for the next
supervisor, which takes over services that still live instead of starting them twice. Only one runs per MORAY_HOME: it
holds a file lock for as long as it lives. `stop` ends exactly what belongs to the services, by their mark.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import TypeAdapter

from moray.platform.atomic import write_json
from moray.platform.home import Home
from moray.platform.processes import MARK, Process, end, kill, marked

POLL_SECONDS = 0.25
_LONGEST_BACKOFF = 30.0
_SETTLED_SECONDS = 60.0  # after so long a death counts as the first again
_STOP_SECONDS = 4.0

ServiceState = Literal["waiting", "starting", "running", "restarting", "stopped"]


@dataclass(frozen=True)
class Service:
    """One program to keep running. `ready` tells whether it answers; `after` names services it needs."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], bool]
    after: Sequence[str] = ()
    prepare: Callable[[], None] = lambda: None  # before each start
    start_seconds: float = 120.0  # not ready for so long: it is started anew


@dataclass
class ServiceStatus:
    """What is known of a service. `since`: when it reached its state; `detail`: the last reason it was restarted."""

    name: str
    state: ServiceState = "waiting"
    pid: int | None = None
    started: float | None = None  # of the process
    since: float = field(default_factory=time.time)
    restarts: int = 0
    detail: str = ""

    @property
    def process(self) -> Process | None:
        return Process(self.pid, self.started) if self.pid is not None and self.started is not None else None


_statuses = TypeAdapter(dict[str, ServiceStatus])


def read_state(home: Home) -> dict[str, ServiceStatus]:
    """The services as the supervisor last wrote them; empty if none ever ran. The name `supervisor` is its own."""
    try:
        return _statuses.validate_json((home.up / "state.json").read_bytes())
    except FileNotFoundError:
        return {}


def mark_of(home: Home, service: str) -> str:
    """What stands in the environment of all processes of a service of this MORAY_HOME."""
    return f"{home.root}:{service}"


class Supervisor:
    """Runs `services` (in the order of their dependencies) until `stop()`."""

    def __init__(self, home: Home, services: Sequence[Service], say: Callable[[str], None] = print) -> None:
        self._home = home
        self._services = services
        self._say = say
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._failures: dict[str, int] = {service.name: 0 for service in services}
        self._not_before: dict[str, float] = {}
        self._launched: dict[str, float] = {}
        self._lock: IO[str] | None = None
        self._stopping = False
        self.status = {service.name: ServiceStatus(service.name) for service in services}

    def acquire(self) -> bool:
        """True if this is now the only supervisor of its MORAY_HOME."""
        self._home.up.mkdir(parents=True, exist_ok=True)
        file = (self._home.up / "supervisor.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._lock = file
        self._adopt()
        return True

    def run(self) -> None:
        """Keeps going until another thread or a signal handler calls `stop()`; then ends everything."""
        try:
            while not self._stopping:
                for service in self._services:
                    self._look_after(service)
                time.sleep(POLL_SECONDS)
        finally:
            self._end_all()

    def stop(self) -> None:
        self._stopping = True

    def _adopt(self) -> None:
        """Takes over services that live, and clears away what is left of those that do not."""
        known = read_state(self._home)
        for service in self._services:
            old = known.get(service.name)
            if old and old.process and old.process.alive():
                self.status[service.name] = old
                self._launched[service.name] = time.monotonic()
                self._say(f"{service.name}: adopted process {old.pid}")
            else:
                kill(marked(mark_of(self._home, service.name)))
        self._write()

    def _look_after(self, service: Service) -> None:
        status = self.status[service.name]
        child = self._children.get(service.name)
        if child is not None:
            child.poll()  # so that a dead child does not stay a zombie
        if status.process is None:
            if self._may_start(service):
                self._start(service)
        elif not status.process.alive():
            self._restart(service, f"process {status.pid} ended" + (f" with {child.returncode}" if child else ""))
        elif status.state != "running" and service.ready():
            self._set(service, "running")
            self._say(f"{service.name}: up")
        elif status.state == "running":
            if time.time() - status.since > _SETTLED_SECONDS:
                self._failures[service.name] = 0
        elif time.monotonic() - self._launched[service.name] > service.start_seconds:
            self._restart(service, f"did not answer within {service.start_seconds:.0f} s")

    def _may_start(self, service: Service) -> bool:
        ready = all(self.status[name].state == "running" for name in service.after)
        return ready and time.monotonic() >= self._not_before.get(service.name, 0.0)

    def _start(self, service: Service) -> None:
        service.prepare()
        log = self._home.up / "logs" / f"{service.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        _rotate(log)
        with log.open("ab") as file:
            child = subprocess.Popen(
                service.command,
                env={**os.environ, **service.environment, MARK: mark_of(self._home, service.name)},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
            )  # fmt: skip
        self._children[service.name] = child
        self._launched[service.name] = time.monotonic()
        process = Process.of(child.pid)
        status = self.status[service.name]
        status.pid, status.started = child.pid, process.started if process else 0.0
        self._set(service, "starting" if status.restarts == 0 else "restarting")

    def _restart(self, service: Service, why: str) -> None:
        """Ends what is left of a service and lets it start again, later each time it dies young."""
        kill(marked(mark_of(self._home, service.name)))
        failures = self._failures[service.name]
        delay = min(_LONGEST_BACKOFF, 0.5 * 2**failures) if failures else 0.0
        self._failures[service.name] = failures + 1
        self._not_before[service.name] = time.monotonic() + delay
        status = self.status[service.name]
        status.pid = status.started = None
        status.restarts += 1
        status.detail = why
        self._say(f"{service.name}: {why}; starting it again" + (f" in {delay:.0f} s" if delay else ""))
        self._set(service, "restarting")

    def _set(self, service: Service, state: ServiceState) -> None:
        status = self.status[service.name]
        status.state, status.since = state, time.time()
        self._write()

    def _write(self) -> None:
        me = Process.of(os.getpid())
        own = ServiceStatus("supervisor", "running", os.getpid(), me.started if me else None)
        everything = {**self.status, "supervisor": own}
        write_json(self._home.up / "state.json", {name: asdict(status) for name, status in everything.items()})

    def _end_all(self) -> None:
        end_services(self._home, [service.name for service in self._services])
        for child in self._children.values():
            child.wait()
        for status in self.status.values():
            status.state, status.pid, status.started, status.since = "stopped", None, None, time.time()
        write_json(self._home.up / "state.json", {name: asdict(status) for name, status in self.status.items()})
        if self._lock is not None:
            self._lock.close()


def end_services(home: Home, names: Sequence[str]) -> None:
    """Ends every process of these services; also where no supervisor lives. The last one first: it watches the others.

    Ray's daemons wait long for each other when all are told to go; nothing is lost when they are killed instead.
    """
    *watched, watcher = names
    for group in ([watcher], watched):
        end([p for name in group for p in marked(mark_of(home, name))], _STOP_SECONDS, time.sleep)
        kill([p for name in group for p in marked(mark_of(home, name))])  # what was started in the meantime


def _rotate(log: Path, most: int = 8 << 20) -> None:
    """Keeps one older log beside the current one, so that a service that dies often does not fill the disk."""
    if log.exists() and log.stat().st_size > most:
        log.replace(log.with_suffix(".old.log"))


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours with this Python."""
    return [sys.executable, "-m", module, *arguments]
