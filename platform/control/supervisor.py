"""Keeps services running: starts them in order, restarts what dies or hangs, adopts what a dead supervisor left alive.

What it knows stands in `up/state.json`, written at every change: for `moray status`, for the page, and for the next
supervisor, which takes over services that still live instead of starting them twice. It is a convenience only: what
lives is found by its marks (`processes.py`), whatever that file says. Only one supervisor runs per MORAY_HOME: it holds
a file lock for as long as it lives. `stop` ends exactly what belongs to the services.

Notable: an error in a pass costs that pass. A full disk, a stranger at a port, a service that answers nonsense must not
end what watches over all the others.
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
_LOOK_SECONDS = 5.0  # between two looks at a service that runs
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
    # Whether a service that runs is itself well; asked in a thread. Not for so long: it is started anew.
    answers: Callable[[], bool] = lambda: True
    hang_seconds: float = 60.0


@dataclass
class ServiceStatus:
    """What is known of a service. `since`: when it reached its state; `detail`: the last reason it was restarted."""

    name: str
    state: ServiceState = "waiting"
    pid: int | None = None
    started: str | None = None  # what tells the process from others with its pid
    since: float = field(default_factory=time.time)
    restarts: int = 0
    detail: str = ""

    @property
    def process(self) -> Process | None:
        return Process(self.pid, self.started) if self.pid is not None and self.started is not None else None


_statuses = TypeAdapter(dict[str, ServiceStatus])


def read_state(home: Home) -> dict[str, ServiceStatus]:
    """The services as the supervisor last wrote them; empty if none ever ran, or if the file is damaged. The name
    `supervisor` is its own."""
    try:
        return _statuses.validate_json((home.up / "state.json").read_bytes())
    except (OSError, ValidationError):
        return {}


def supervisors(home: Home) -> list[Process]:
    """The living supervisors of this MORAY_HOME: the one with the lock, and any that just begins."""
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


class _Look:
    """Asks a service again and again, in a thread: one that does not answer holds up no other.

    found: its last answer. answered: when that was yes, by the monotonic clock; at first now.
    """

    def __init__(self) -> None:
        self.found = False
        self.answered = time.monotonic()
        self._asked = -math.inf
        self._thread: threading.Thread | None = None

    def ask(self, question: Callable[[], bool], every: float) -> None:
        """Begins to, unless it is being asked or was less than `every` seconds ago."""
        if (self._thread and self._thread.is_alive()) or time.monotonic() - self._asked < every:
            return
        self._asked = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=[question], name="look", daemon=True)
        self._thread.start()

    def _run(self, question: Callable[[], bool]) -> None:
        try:
            self.found = question()
        except Exception:  # an answer that is none
            self.found = False
        if self.found:
            self.answered = time.monotonic()


class Supervisor:
    """Runs `services` (in the order of their dependencies) until `stop()`."""

    def __init__(self, home: Home, services: Sequence[Service], say: Callable[[str], None] = print) -> None:
        self._home = home
        self._services = services
        self._report = say
        self._unwritten = False  # the state file lacks the last change: the disk had no room
        self._looks: dict[str, _Look] = {}
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
        """Keeps going until another thread or a signal handler calls `stop()`; then ends everything."""
        try:
            while not self._stopping:
                for service in self._services:
                    try:
                        self._look_after(service)
                    except Exception as error:
                        self._failed(service, error)
                if self._unwritten:
                    self._write()
                time.sleep(POLL_SECONDS)
        finally:
            self._end_all()

    def _failed(self, service: Service, error: Exception) -> None:
        """A pass over a service that could not be made: it is tried again, later each time."""
        failures = self._failures[service.name] = self._failures[service.name] + 1
        delay = min(_LONGEST_BACKOFF, 0.5 * 2 ** min(failures, 10))
        self._not_before[service.name] = time.monotonic() + delay
        self._say(f"{service.name}: {type(error).__name__}: {error}; trying again in {delay:.0f} s")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, a pipe that nobody reads
            self._report(text)

    def stop(self) -> None:
        self._stopping = True

    def _adopt(self) -> None:
        """Takes over services that live, and clears away what is left of those that do not."""
        known = read_state(self._home)
        for service in self._services:
            old = known.get(service.name)
            if not (old and old.process and old.process.alive()):
                old = self._found(service)
            if old is not None:
                self.status[service.name] = old
                self._launched[service.name] = time.monotonic()
                self._say(f"{service.name}: adopted process {old.pid}")
            else:
                kill(marked(self._home.root, service.name))
        self._write()

    def _found(self, service: Service) -> ServiceStatus | None:
        """A living process that runs a service's command, of which no file tells."""
        for process in marked(self._home.root, service.name):
            if process.arguments() == list(service.command):
                return ServiceStatus(service.name, "starting", process.pid, process.started)
        return None

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
        elif status.state == "running":
            self._look_at_running(service)
        elif self._look(service, service.ready).found:
            self._looks.pop(service.name)
            self._set(service, "running")
            self._say(f"{service.name}: up")
        elif time.monotonic() - self._launched[service.name] > service.start_seconds:
            self._restart(service, f"did not answer within {service.start_seconds:.0f} s")

    def _look_at_running(self, service: Service) -> None:
        """Running is what answers: a process that was stopped, or whose socket is gone, lives and does not."""
        look = self._look(service, service.answers, _LOOK_SECONDS)
        silent = time.monotonic() - look.answered
        if silent > service.hang_seconds:
            self._restart(service, f"has not answered for {silent:.0f} s")
        elif look.answered - self._launched[service.name] > _SETTLED_SECONDS:
            self._failures[service.name] = 0

    def _look(self, service: Service, question: Callable[[], bool], every: float = 0.0) -> _Look:
        """What is known of a service's answer; asks again if the last time was more than `every` seconds ago."""
        look = self._looks.setdefault(service.name, _Look())
        look.ask(question, every)
        return look

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
        self._looks.pop(service.name, None)
        process = Process.of(child.pid)
        status = self.status[service.name]
        status.pid, status.started = child.pid, process.started if process else ""
        self._set(service, "starting" if status.restarts == 0 else "restarting")

    def _restart(self, service: Service, why: str) -> None:
        """Ends what is left of a service and lets it start again, later each time it dies young."""
        kill(marked(self._home.root, service.name))
        failures = self._failures[service.name]
        delay = min(_LONGEST_BACKOFF, 0.5 * 2 ** min(failures, 10)) if failures else 0.0
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
        self._keep({**self.status, SUPERVISOR: own})

    def _keep(self, statuses: Mapping[str, ServiceStatus]) -> None:
        content = {name: asdict(status) for name, status in statuses.items()}
        try:
            write_json(self._home.up / "state.json", content)
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                self._say(f"state.json is not written: {error}")
            self._unwritten = True

    def _end_all(self) -> None:
        end_services(self._home, [service.name for service in self._services])
        for child in self._children.values():
            child.wait()
        for status in self.status.values():
            status.state, status.pid, status.started, status.since = "stopped", None, None, time.time()
        self._keep(self.status)
        if self._lock is not None:
            self._lock.close()


def end_services(home: Home, names: Sequence[str]) -> None:
    """Ends every process of these services; also where no supervisor lives. The last one first: it watches the others.

    Ray's daemons wait long for each other when all are told to go; nothing is lost when they are killed instead.
    """
    *watched, watcher = names
    for group in ([watcher], watched):
        end([p for name in group for p in marked(home.root, name)], _STOP_SECONDS, time.sleep)
        kill([p for name in group for p in marked(home.root, name)])  # what was started in the meantime


@contextlib.contextmanager
def _log_of(home: Home, name: str) -> Iterator[int]:
    """A file descriptor that a service's output goes to: its log, or nowhere if the disk has no room for one."""
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
    """Keeps one older log beside the current one, so that a service that dies often does not fill the disk."""
    if log.exists() and log.stat().st_size > most:
        log.replace(log.with_suffix(".old.log"))


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours with this Python."""
    return [sys.executable, "-P", "-m", module, *arguments]
