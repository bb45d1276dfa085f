"""`moray up`: the control plane of one MORAY_HOME on this machine, as services under one supervisor.

Ray's head and worker (cluster/local.py), MLflow on a Unix socket, the controller with API and page. What was decided on
first use (ports, slots) is kept in `up/options.json`, so that a restart finds the same things at the same places.
"""

from __future__ import annotations

import http.client
import importlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moray.platform.control.auth import ensure_token
from moray.platform.control.supervisor import (
    SUPERVISOR,
    Service,
    ServiceStatus,
    Supervisor,
    end_services,
    python,
    read_state,
    supervisors,
)
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.home import Home
from moray.platform.core.ports import check_port, free_ports, is_free
from moray.platform.core.processes import MARK, Process, marked, marks, module_folders
from moray.platform.run.mlflow_tracking import database_uri

HOST = "127.0.0.1"
PORT = 8400
NAMES = ("ray-head", "ray-worker", "ray-watch", "mlflow", "controller")
_UP_SECONDS = 240.0
_DOWN_SECONDS = 90.0


class UpOptions(BaseModel):
    """`up/options.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int = Field(ge=1, le=65535)
    cluster: Any  # cluster.local.LocalOptions

    @classmethod
    def read(cls, home: Home) -> UpOptions:
        """What `moray up` decided here. Raises InputError if it never ran, or another version wrote it."""
        path = home.up / "options.json"
        try:
            found = cls.model_validate_json(path.read_bytes())
            return found.model_copy(update={"cluster": _local().LocalOptions.model_validate(found.cluster)})
        except FileNotFoundError:
            raise InputError(f"nothing was started for {home.root} yet", "start it: moray up") from None
        except ValidationError as error:
            raise InputError(
                f"{path} is not what this version writes", f"moray down, delete {path}, moray up"
            ) from error


def local_cluster(home: Home, options: UpOptions) -> Any:
    """The Ray cluster of this MORAY_HOME (cluster/local.py)."""
    return _local().LocalCluster(home, options.cluster)


def ray_jobs(cluster: Any) -> Any:
    """The backend that runs attempts there (cluster/ray_jobs.py)."""
    module: Any = importlib.import_module("moray.cluster.ray_jobs")
    return module.RayJobs(cluster)


def url(options: UpOptions) -> str:
    return f"http://{HOST}:{options.port}"


def decide(
    home: Home, *, port: int | None = None, cpus: int | None = None, gpus: int | None = None, slots: int | None = None
) -> UpOptions:
    """The options for a start: what was decided before, with what is asked for now. Writes them.

    Raises InputError for a port in use and for what this machine does not have.
    """
    local = _local()
    try:
        old = UpOptions.read(home)
        ports = {name: getattr(old.cluster, name) for name in _RAY_PORTS}
        asked: dict[str, Any] = {"cpus": cpus or old.cluster.cpus, "gpus": old.cluster.gpus if gpus is None else gpus}
        asked["slots"] = slots or old.cluster.slots
        port = port or old.port
    except InputError:
        ports = {name: 0 for name in _RAY_PORTS}
        asked = {"cpus": cpus, "gpus": gpus, "slots": slots}
    chosen = port or PORT
    if _living(home):
        return UpOptions.read(home)  # the supervisor alone died: what it started is adopted as it is
    check_port(HOST, chosen)
    if not all(ports.values()) or not all(map(is_free, ports.values())):
        ports = dict(zip(_RAY_PORTS, free_ports(len(_RAY_PORTS)), strict=True))
    options = UpOptions(port=chosen, cluster=local.default_options(ports, **asked))
    write_json(home.up / "options.json", options.model_dump(mode="json"))
    return options


def services(home: Home, options: UpOptions) -> list[Service]:
    """Everything that runs, in the order of starting."""
    cluster = local_cluster(home, options)
    environment = {**cluster.environment(), "MORAY_HOME": str(home.root)}
    ensure_token(home)
    return [
        *cluster.services(),
        Service(
            "mlflow", _mlflow(home), {**environment, **_MLFLOW_ENVIRONMENT}, lambda: _answers(mlflow_socket(home)),
            answers=lambda: _answers(mlflow_socket(home)),
        ),
        Service(
            "controller", python("moray.platform.server.app"), environment, lambda: healthy(options),
            after=["ray-head"], answers=lambda: healthy(options),
        ),
    ]  # fmt: skip


def supervise(home: Home, say: Callable[[str], None] = print) -> None:
    """Runs the services of this MORAY_HOME until SIGTERM or SIGINT. Raises InputError if somebody does already.

    Where `moray up` never ran, as under systemd, the options are decided here.
    """
    known = (home.up / "options.json").exists()
    supervisor = Supervisor(home, services(home, UpOptions.read(home) if known else decide(home)), say)
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
            env={**os.environ, **environment, **marks(home.root, SUPERVISOR)}, cwd="/",
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


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


def _living(home: Home) -> list[str]:
    """The services that live, with or without a supervisor."""
    return [name for name in NAMES if marked(home.root, name)]


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


def healthy(options: UpOptions) -> bool:
    """Whether the controller answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url(options)}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # nobody there, or a stranger that speaks no HTTP
        return False


def mlflow_socket(home: Home) -> Path:
    """Where MLflow listens: in the private folder that Ray's sockets lie in, whose path is short."""
    return Path(_local().short_folder(home)) / "mlflow.sock"


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


def _mlflow(home: Home) -> list[str]:
    """MLflow's server. Its socket's folder is private, so it needs no check of host names."""
    return [
        sys.executable, "-P", "-m", "mlflow", "server", "--backend-store-uri", database_uri(home),
        "--default-artifact-root", home.mlflow_artifacts.as_uri(), "--static-prefix", "/mlflow", "--workers", "1",
        "--uvicorn-opts", f"--uds {shlex.quote(str(mlflow_socket(home)))} --log-level warning",
    ]  # fmt: skip


# No telemetry, and none of the seven processes for jobs of MLflow's own, which Moray does not use.
_MLFLOW_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _answers(path: Path) -> bool:
    """Whether an HTTP server behind a socket answers: that it can be connected to is said by the kernel alone."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
            probe.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return probe.recv(5) == b"HTTP/"
        except OSError:
            return False


# None of them is Ray's usual one: of two clusters that start at a time, each would find that free.
_RAY_PORTS = ("ray_port", "dashboard_port", "client_port")


def _local() -> Any:
    return importlib.import_module("moray.cluster.local")


if __name__ == "__main__":
    supervise(Home.from_environment(), lambda text: print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True))
