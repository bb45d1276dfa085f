"""`moray up` and `moray down`: start, supervise and stop the control plane of one MORAY_HOME on this machine.

options.py holds the options chosen at the first start, services.py the list of services.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from moray.platform.control.options import NAMES, UpOptions, decide_options
from moray.platform.control.services import services
from moray.platform.control.supervisor import (
    SUPERVISOR,
    ServiceStatus,
    Supervisor,
    end_services,
    python,
    read_state,
    supervisors,
)
from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.home import Home
from moray.platform.core.processes import MARK, Process, marked, marks, module_folders

_UP_SECONDS = 240.0
_DOWN_SECONDS = 90.0


def supervise(home: Home, log: Callable[[str], None] = print) -> None:
    """Runs the services of this MORAY_HOME until SIGTERM or SIGINT. Raises InputError if a supervisor already runs.

    Chooses the options if there are none yet: under systemd, this is the first start.
    """
    known = (home.up / "options.json").exists()
    supervisor = Supervisor(home, services(home, UpOptions.read(home) if known else decide_options(home)), log)
    if not supervisor.acquire():
        raise InputError(f"the control plane of {home.root} is already running", "moray status")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    supervisor.run()


def start(home: Home) -> subprocess.Popen[bytes]:
    """Starts the supervisor as a separate process that outlives this one."""
    log = home.up / "logs" / "supervisor.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONPATH": os.pathsep.join(module_folders()), "MORAY_HOME": str(home.root)}
    with log.open("ab") as file:
        return subprocess.Popen(
            python("moray.platform.control.up"),
            env={**os.environ, **environment, **marks(home.root, SUPERVISOR)},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until_up(home: Home, supervisor: subprocess.Popen[bytes]) -> Iterator[ServiceStatus]:
    """Yields each service as it comes up.

    Raises StepFailed, with the last line of the log, if a service does not come up or the supervisor dies.
    """
    deadline = time.monotonic() + _UP_SECONDS
    waiting = set(NAMES)
    while waiting:
        state = read_state(home)
        for name in NAMES:
            status = state.get(name)
            # A killed supervisor leaves an outdated state file, so only living processes count.
            if name in waiting and status and status.state == "running" and status.process and status.process.alive():
                waiting.remove(name)
                yield status
        if time.monotonic() > deadline:
            name = next(name for name in NAMES if name in waiting)
            _fail(home, name, f"{name} did not come up within {_UP_SECONDS:.0f} s")
        if supervisor.poll() is not None and not supervisors(home):  # another supervisor may have taken the lock
            _fail(home, SUPERVISOR, f"the supervisor exited with code {supervisor.returncode}")
        time.sleep(0.1)


def _fail(home: Home, name: str, problem: str) -> NoReturn:
    log = home.up / "logs" / f"{name}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    raise StepFailed(f"{problem}: {(lines or ['no log'])[-1]}", f"see {log}; moray down stops all services")


def is_up(home: Home) -> bool:
    """Whether a supervisor is running."""
    known = read_state(home).get(SUPERVISOR)
    return bool(known and known.process and known.process.alive()) or bool(supervisors(home))


def down(home: Home) -> int:
    """Stops the supervisor and everything it started, and nothing else. Returns the number of processes found.

    Also finds a supervisor that has just started and has not written a file yet. Raises StepFailed if processes survive
    SIGKILL, because they hang in the kernel.
    """
    ended: set[Process] = set()
    deadline = time.monotonic() + 2 * _DOWN_SECONDS
    while found := _all_of(home):
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in found)
            raise StepFailed(f"processes {pids} do not end", "check their disks and file systems; see dmesg")
        ended |= found
        _end_supervisors(home)
        end_services(home, NAMES)
        time.sleep(0.5)  # processes that were being forked become visible
    return len(ended)


def _all_of(home: Home) -> set[Process]:
    """Every living process of the control plane of this MORAY_HOME."""
    return {*supervisors(home), *(process for name in NAMES for process in marked(home.root, name))}


def _end_supervisors(home: Home) -> None:
    """Sends SIGTERM, leaves time for a clean stop of the services, then sends SIGKILL."""
    deadline = time.monotonic() + _DOWN_SECONDS
    living = supervisors(home)
    for one in living:
        one.send(signal.SIGTERM)
    while any(one.alive() for one in living) and time.monotonic() < deadline:
        time.sleep(0.1)
    for one in living:
        one.send(signal.SIGKILL)


def systemd_unit(home: Home) -> str:
    """A user unit that keeps the supervisor running from login, or with lingering from boot."""
    environment = {"MORAY_HOME": str(home.root), MARK: marks(home.root, SUPERVISOR)[MARK]}
    settings = "\n".join(f"Environment={_for_systemd(f'{name}={value}')}" for name, value in environment.items())
    return f"""[Unit]
Description=Moray control plane of {str(home.root).replace("%", "%%")}

[Service]
ExecStart={_for_systemd(sys.executable).replace("$", "$$")} -P -m moray.platform.control.up
{settings}
Restart=on-failure
RestartSec=2
KillMode=process
TimeoutStopSec={_DOWN_SECONDS:.0f}

[Install]
WantedBy=default.target
"""


def _for_systemd(text: str) -> str:
    """Quotes one word of a unit file's line and escapes specifiers (see systemd.syntax, systemd.unit)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


if __name__ == "__main__":
    supervise(Home.from_environment(), lambda text: print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True))
