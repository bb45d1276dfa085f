"""`moray up` and `moray down`: starts, watches and ends the control plane of one MORAY_HOME on this machine.

options.py has what was decided on first use, services.py what is started.
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


def supervise(home: Home, say: Callable[[str], None] = print) -> None:
    """Runs the services of this MORAY_HOME until SIGTERM or SIGINT. Raises InputError if somebody does already.

    Where `moray up` never ran, as under systemd, the options are decided here.
    """
    known = (home.up / "options.json").exists()
    supervisor = Supervisor(home, services(home, UpOptions.read(home) if known else decide_options(home)), say)
    if not supervisor.acquire():
        raise InputError(f"the control plane of {home.root} is up already", "moray status")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    supervisor.run()


def start(home: Home) -> subprocess.Popen[bytes]:
    """Starts the supervisor as a process of its own, which outlives this one."""
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
    """Gives each service when it has come up. Raises StepFailed with the end of a log if one does not, or if no
    supervisor lives to start it."""
    deadline = time.monotonic() + _UP_SECONDS
    waiting = set(NAMES)
    while waiting:
        state = read_state(home)
        for name in NAMES:
            status = state.get(name)
            # A supervisor that was killed leaves its last words; only what lives counts.
            if name in waiting and status and status.state == "running" and status.process and status.process.alive():
                waiting.remove(name)
                yield status
        if time.monotonic() > deadline:
            name = next(name for name in NAMES if name in waiting)
            _give_up(home, name, f"{name} is not up after {_UP_SECONDS:.0f} s")
        if supervisor.poll() is not None and not supervisors(home):  # another one may have been first
            _give_up(home, SUPERVISOR, f"the supervisor ended with {supervisor.returncode}")
        time.sleep(0.1)


def _give_up(home: Home, name: str, what: str) -> NoReturn:
    log = home.up / "logs" / f"{name}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    raise StepFailed(f"{what}: {(lines or ['no log'])[-1]}", f"see {log}; moray down ends what was started")


def is_up(home: Home) -> bool:
    """Whether a supervisor lives."""
    known = read_state(home).get(SUPERVISOR)
    return bool(known and known.process and known.process.alive()) or bool(supervisors(home))


def down(home: Home) -> int:
    """Ends the supervisor and everything it started, and nothing else; how many processes it found.

    A supervisor that has only begun, and is not in any file yet, is found and ended too. Raises StepFailed for
    processes that SIGKILL does not end: they hang in the kernel.
    """
    ended: set[Process] = set()
    deadline = time.monotonic() + 2 * _DOWN_SECONDS
    while found := _all_of(home):
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in found)
            raise StepFailed(f"processes {pids} do not end", "do their disks and file systems answer? see dmesg")
        ended |= found
        _end_supervisors(home)
        end_services(home, NAMES)
        time.sleep(0.5)  # what was just being forked shows now
    return len(ended)


def _all_of(home: Home) -> set[Process]:
    """Every living process of the control plane of this MORAY_HOME."""
    return {*supervisors(home), *(process for name in NAMES for process in marked(home.root, name))}


def _end_supervisors(home: Home) -> None:
    """Each has the time to end its services well."""
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
    """One word of a unit's line: quoted, without specifiers (systemd.syntax, systemd.unit)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


if __name__ == "__main__":
    supervise(Home.from_environment(), lambda text: print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True))
