"""Supervises services: starts them in order, restarts dead or hung ones, adopts those left by a dead supervisor.

The supervisor writes the state of its services to `up/state.json` at every change: for `moray status`, for the page and
for the next supervisor, which adopts living services instead of starting them twice. The file is only a convenience,
because living processes are found by the marks in their environment (`processes.py`). A file lock, held for the whole
life of the process, ensures a single supervisor per MORAY_HOME. `stop` ends only processes of the services.

Notable: an error while checking one service does not end the supervisor. This covers a full disk, another program on a
service's port, and malformed answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import TypeAdapter, ValidationError

from moray.platform.core.atomic import write_json
from moray.platform.core.home import Home
from moray.platform.core.processes import Process, end, kill, marked, marks

POLL_SECONDS = 0.25
SUPERVISOR = "supervisor"
LOCK = "supervisor.lock"
_PROBE_SECONDS = 5.0  # between two probes of a running service
_LONGEST_BACKOFF = 30.0
_SETTLED_SECONDS = 60.0  # after this time in good health, the back-off starts again from zero
_STOP_SECONDS = 4.0

ServiceState = Literal["waiting", "starting", "running", "restarting", "stopped"]


@dataclass(frozen=True)
class Service:
    """One program to keep running.

    ready: whether a starting service answers. after: names of the services it depends on. prepare: called before each
    start. answers: whether a running service is healthy, called in a thread. A service is restarted if it is not ready
    within `start_seconds`, or does not answer for `hang_seconds`.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], bool]
    after: Sequence[str] = ()
    prepare: Callable[[], None] = lambda: None
    start_seconds: float = 120.0
    answers: Callable[[], bool] = lambda: True
    hang_seconds: float = 60.0


@dataclass
class ServiceStatus:
    """State of a service. `since`: time of the last state change. `detail`: reason of the last restart."""

    name: str
    state: ServiceState = "waiting"
    pid: int | None = None
    started: str | None = None  # start time of the process, which distinguishes it from later ones with this pid
    since: float = field(default_factory=time.time)
    restarts: int = 0
    detail: str = ""

    @property
    def process(self) -> Process | None:
        return Process(self.pid, self.started) if self.pid is not None and self.started is not None else None


_statuses = TypeAdapter(dict[str, ServiceStatus])


def read_state(home: Home) -> dict[str, ServiceStatus]:
    """Reads the states of all services, and under the name `supervisor` that of the supervisor itself.

    Returns an empty dictionary if none ever ran or the file is damaged.
    """
    try:
        return _statuses.validate_json((home.up / "state.json").read_bytes())
    except (OSError, ValidationError):
        return {}


def supervisors(home: Home) -> list[Process]:
    """The living supervisors of this MORAY_HOME: the holder of the lock and any that is just starting."""
    found = marked(home.root, SUPERVISOR)
    try:
        pid = int((home.up / LOCK).read_text())
    except (OSError, ValueError):
        return found
    holder = Process.of(pid)
    return [*found, holder] if holder and holder not in found and _is_locked(home) else found


def _is_locked(home: Home) -> bool:
    with (home.up / LOCK).open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class _Probe:
    """Checks a service repeatedly in a thread, so that a hung service does not hold up the others.

    healthy: result of the last check. last_healthy: monotonic time of the last successful check, initially now.
    """

    def __init__(self) -> None:
        self.healthy = False
        self.last_healthy = time.monotonic()
        self._began = -math.inf
        self._thread: threading.Thread | None = None

    def begin(self, check: Callable[[], bool], every: float) -> None:
        """Starts a check, unless one is running or the last one began less than `every` seconds ago."""
        if (self._thread and self._thread.is_alive()) or time.monotonic() - self._began < every:
            return
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=[check], name="probe", daemon=True)
        self._thread.start()

    def _run(self, check: Callable[[], bool]) -> None:
        try:
            self.healthy = check()
        except Exception:  # for example a malformed answer
            self.healthy = False
        if self.healthy:
            self.last_healthy = time.monotonic()


class Supervisor:
    """Runs `services` (in the order of their dependencies) until `stop()`."""

    def __init__(self, home: Home, services: Sequence[Service], log: Callable[[str], None] = print) -> None:
        self._home = home
        self._services = services
        self._log_line = log
        self._unwritten = False  # the state file lacks the last change, because the disk was full
        self._probes: dict[str, _Probe] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._failures: dict[str, int] = {service.name: 0 for service in services}
        self._not_before: dict[str, float] = {}
        self._launched: dict[str, float] = {}
        self._lock: IO[str] | None = None
        self._stopping = False
        self.status = {service.name: ServiceStatus(service.name) for service in services}

    def acquire(self) -> bool:
        """Takes the lock and adopts living services; returns False if another supervisor holds the lock."""
        self._home.up.mkdir(parents=True, exist_ok=True)
        file = (self._home.up / LOCK).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._lock = file
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        self._adopt()
        return True

    def run(self) -> None:
        """Supervises until another thread or a signal handler calls `stop()`, then ends all services."""
        try:
            while not self._stopping:
                for service in self._services:
                    try:
                        self._check(service)
                    except Exception as error:
                        self._failed(service, error)
                if self._unwritten:
                    self._write()
                time.sleep(POLL_SECONDS)
        finally:
            self._end_all()

    def _failed(self, service: Service, error: Exception) -> None:
        """Schedules the next check of a service whose check raised an error, with exponential back-off."""
        failures = self._failures[service.name] = self._failures[service.name] + 1
        delay = min(_LONGEST_BACKOFF, 0.5 * 2 ** min(failures, 10))
        self._not_before[service.name] = time.monotonic() + delay
        self._log(f"{service.name}: {type(error).__name__}: {error}; trying again in {delay:.0f} s")

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, a pipe without a reader
            self._log_line(text)

    def stop(self) -> None:
        self._stopping = True

    def _adopt(self) -> None:
        """Adopts living services and kills the remaining processes of dead ones."""
        known = read_state(self._home)
        for service in self._services:
            old = known.get(service.name)
            if not (old and old.process and old.process.alive()):
                old = self._find(service)
            if old is not None:
                self.status[service.name] = old
                self._launched[service.name] = time.monotonic()
                self._log(f"{service.name}: adopted process {old.pid}")
            else:
                kill(marked(self._home.root, service.name))
        self._write()

    def _find(self, service: Service) -> ServiceStatus | None:
        """A living process with the service's marks and command that the state file does not list."""
        for process in marked(self._home.root, service.name):
            if process.arguments() == list(service.command):
                return ServiceStatus(service.name, "starting", process.pid, process.started)
        return None

    def _check(self, service: Service) -> None:
        status = self.status[service.name]
        child = self._children.get(service.name)
        if child is not None:
            child.poll()  # reaps a dead child
        if status.process is None:
            if self._may_start(service):
                self._start(service)
        elif not status.process.alive():
            code = f" with exit code {child.returncode}" if child else ""
            self._restart(service, f"process {status.pid} ended{code}")
        elif status.state == "running":
            self._check_running(service)
        elif self._probe(service, service.ready).healthy:
            self._probes.pop(service.name)
            self._set(service, "running")
            self._log(f"{service.name}: up")
        elif time.monotonic() - self._launched[service.name] > service.start_seconds:
            self._restart(service, f"no answer within {service.start_seconds:.0f} s of its start")

    def _check_running(self, service: Service) -> None:
        """Restarts a service that does not answer, for example a stopped process or one whose socket was deleted."""
        probe = self._probe(service, service.answers, _PROBE_SECONDS)
        silent = time.monotonic() - probe.last_healthy
        if silent > service.hang_seconds:
            self._restart(service, f"no answer for {silent:.0f} s")
        elif probe.last_healthy - self._launched[service.name] > _SETTLED_SECONDS:
            self._failures[service.name] = 0

    def _probe(self, service: Service, check: Callable[[], bool], every: float = 0.0) -> _Probe:
        """Returns the service's probe; begins a new check if the last one is more than `every` seconds old."""
        probe = self._probes.setdefault(service.name, _Probe())
        probe.begin(check, every)
        return probe

    def _may_start(self, service: Service) -> bool:
        ready = all(self.status[name].state == "running" for name in service.after)
        return ready and time.monotonic() >= self._not_before.get(service.name, 0.0)

    def _start(self, service: Service) -> None:
        service.prepare()
        with _log_of(self._home, service.name) as file:
            child = subprocess.Popen(
                service.command,
                env={**os.environ, **service.environment, **marks(self._home.root, service.name)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )
        self._children[service.name] = child
        self._launched[service.name] = time.monotonic()
        self._probes.pop(service.name, None)
        process = Process.of(child.pid)
        status = self.status[service.name]
        status.pid, status.started = child.pid, process.started if process else ""
        self._set(service, "starting" if status.restarts == 0 else "restarting")

    def _restart(self, service: Service, reason: str) -> None:
        """Kills the service's processes and schedules a start, with back-off for repeated early deaths."""
        kill(marked(self._home.root, service.name))
        failures = self._failures[service.name]
        delay = min(_LONGEST_BACKOFF, 0.5 * 2 ** min(failures, 10)) if failures else 0.0
        self._failures[service.name] = failures + 1
        self._not_before[service.name] = time.monotonic() + delay
        status = self.status[service.name]
        status.pid = status.started = None
        status.restarts += 1
        status.detail = reason
        self._log(f"{service.name}: {reason}; restarting" + (f" in {delay:.0f} s" if delay else ""))
        self._set(service, "restarting")

    def _set(self, service: Service, state: ServiceState) -> None:
        status = self.status[service.name]
        status.state, status.since = state, time.time()
        self._write()

    def _write(self) -> None:
        me = Process.of(os.getpid())
        own = ServiceStatus("supervisor", "running", os.getpid(), me.started if me else None)
        self._save({**self.status, SUPERVISOR: own})

    def _save(self, statuses: Mapping[str, ServiceStatus]) -> None:
        content = {name: asdict(status) for name, status in statuses.items()}
        try:
            write_json(self._home.up / "state.json", content)
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                self._log(f"cannot write state.json: {error}")
            self._unwritten = True

    def _end_all(self) -> None:
        end_services(self._home, [service.name for service in self._services])
        for child in self._children.values():
            child.wait()
        for status in self.status.values():
            status.state, status.pid, status.started, status.since = "stopped", None, None, time.time()
        self._save(self.status)
        if self._lock is not None:
            self._lock.close()


def end_services(home: Home, names: Sequence[str]) -> None:
    """Ends every process of these services, even without a supervisor. The last one ends first: it depends on the rest.

    Ray's daemons wait long for each other after SIGTERM, so they are killed after a few seconds; this loses nothing.
    """
    *others, last = names
    for group in ([last], others):
        end([p for name in group for p in marked(home.root, name)], _STOP_SECONDS, time.sleep)
        kill([p for name in group for p in marked(home.root, name)])  # processes started in the meantime


@contextlib.contextmanager
def _log_of(home: Home, name: str) -> Iterator[int]:
    """Opens the log of a service's output and yields its file descriptor; /dev/null if the disk is full."""
    log = home.up / "logs" / f"{name}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        _rotate(log)
        file = log.open("ab")
    except OSError:
        file = open(os.devnull, "ab")  # noqa: SIM115 - closed below
    with file:
        yield file.fileno()


def _rotate(log: Path, most: int = 8 << 20) -> None:
    """Moves a log above `most` bytes to `.old.log`, so that a service that dies often does not fill the disk."""
    if log.exists() and log.stat().st_size > most:
        log.replace(log.with_suffix(".old.log"))


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs one of Moray's modules with this Python."""
    return [sys.executable, "-P", "-m", module, *arguments]
