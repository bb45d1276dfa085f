"""The Ray cluster of `moray up`: a head with no CPUs and a worker beside it, on this machine, with token auth.

Drivers must not die with the head, so they never run there: a job asks for the custom resource `moray_driver`, which
the worker alone has. The head keeps its state in RocksDB: killed and started again at the same address, it finds its
jobs and actors, and the worker and the drivers reconnect to it.

Ray cannot bind everything to loopback (its own processes talk over the machine's address), so a token guards all of it;
the dashboard alone is bound to 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from moray.cluster import machine
from moray.platform.control.supervisor import Service, python
from moray.platform.core.atomic import create_bytes
from moray.platform.core.cluster import BackendAwayError
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home

DRIVER = "moray_driver"  # the custom resource that a job's driver takes one of
_HEAD_STORE = 80_000_000  # bytes of shared memory; nothing of ours runs on the head
_HEAD_MEMORY = 100_000_000
_SYSTEM_MEMORY = 2 << 30  # what Ray's own processes and the control plane need


class LocalOptions(BaseModel):
    """What `moray up` decided for this MORAY_HOME; kept, so that a restart finds the same cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_port: int
    dashboard_port: int
    client_port: int
    cpus: int = Field(ge=1)
    gpus: int = Field(ge=0)
    memory_bytes: int
    slots: int = Field(ge=1)


class LocalCluster:
    """The services of the local cluster and how to reach it."""

    def __init__(self, home: Home, options: LocalOptions) -> None:
        self.home = home
        self.options = options
        self.folder = short_folder(home)
        self.token = home.up / "ray-token"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.options.ray_port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.options.dashboard_port}"

    def environment(self) -> Mapping[str, str]:
        """What every process needs that talks to this cluster."""
        return {
            **machine.ray_environment(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": self.address,
        }

    def services(self) -> list[Service]:
        """The head, after it the worker, and what watches them."""
        import secrets

        create_bytes(self.token, secrets.token_hex(32).encode())
        environment = {
            **self.environment(),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.home.up / "gcs"),
            "RAY_JOB_START_TIMEOUT_SECONDS": "300",  # later than ours; then Ray forgets what its dead nodes never began
            "RAY_JOB_STOP_WAIT_TIME_S": "30",  # a driver that is told to stop may finish what it writes
        }
        environment.pop("RAY_ADDRESS")  # `ray start` refuses it
        watching = {**self.environment(), "MORAY_HOME": str(self.home.root)}
        return [
            Service(
                "ray-head",
                self._head(),
                environment,
                self._head_answers,
                prepare=self._forget_address,
                answers=self._head_answers,
            ),
            Service(
                "ray-worker",
                self._worker(),
                environment,
                self._worker_known,
                after=["ray-head"],
                answers=lambda: not self._head_answers() or self._worker_known(),
            ),
            Service(
                "ray-watch",
                python("moray.cluster.usage_log", self.address),
                watching,
                self._watched,
                after=["ray-head"],
                answers=lambda: not self._head_answers() or self._watched(),
            ),
        ]

    def _head(self) -> list[str]:
        o = self.options
        return [
            *_ray_start(),
            "--head",
            f"--port={o.ray_port}",
            "--num-cpus=0",
            "--num-gpus=0",
            f"--memory={_HEAD_MEMORY}",
            f"--object-store-memory={_HEAD_STORE}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={o.dashboard_port}",
            f"--ray-client-server-port={o.client_port}",
            "--no-monitor",
            f"--temp-dir={self.folder}",
        ]

    def _worker(self) -> list[str]:
        o = self.options
        store = max(128 << 20, min(4 << 30, o.memory_bytes // 8))
        return [
            *_ray_start(),
            f"--address={self.address}",
            f"--num-cpus={o.cpus}",
            f"--num-gpus={o.gpus}",
            f"--memory={max(1 << 30, o.memory_bytes - store - _SYSTEM_MEMORY)}",
            f"--object-store-memory={store}",
            f"--resources={json.dumps({DRIVER: o.slots})}",
            f"--temp-dir={self.folder}",
        ]

    def _forget_address(self) -> None:
        """`ray start --head` takes this file and a living worker for a cluster that is up at its address."""
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)

    def _head_answers(self) -> bool:
        return self._get("/api/version") is not None

    def _worker_known(self) -> bool:
        """Whether a node other than the head is alive."""
        body = self._get("/api/v0/nodes?detail=0")
        try:
            nodes = json.loads(body)["data"]["result"]["result"] if body else []
            return any(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)
        except (ValueError, LookupError, TypeError):  # a stranger at the dashboard's port
            return False

    def _watched(self) -> bool:
        """Whether the watch has written something lately."""
        from moray.cluster.usage_log import read_usage

        try:
            read_usage(self.home)
        except BackendAwayError:
            return False
        return True

    def _get(self, path: str) -> bytes | None:
        """The body of an answer of Ray's dashboard; None where there is none."""
        request = urllib.request.Request(self.dashboard + path)
        request.add_header("Authorization", f"Bearer {self.token.read_text().strip()}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
        try:
            with opener.open(request, timeout=5) as answer:
                return bytes(answer.read())
        except (OSError, http.client.HTTPException):
            return None


def default_options(
    ports: Mapping[str, int], *, cpus: int | None = None, gpus: int | None = None, slots: int | None = None
) -> LocalOptions:
    """Options for this machine; what is None is decided. Raises InputError for what it does not have."""
    for name, asked, least, have in (("cpus", cpus, 1, machine.cores()), ("gpus", gpus, 0, machine.gpus())):
        if asked is not None and not least <= asked <= have:
            raise InputError(f"--{name} {asked}: this machine has {have}", f"give {least} to {have}, or leave it out")
    if slots is not None and slots < 1:
        raise InputError(f"--slots {slots}: at least one job must be able to run", "give 1 or more")
    chosen = cpus or machine.cores()
    return LocalOptions(
        cpus=chosen,
        gpus=machine.gpus() if gpus is None else gpus,
        memory_bytes=machine.memory_bytes(),
        slots=slots or max(1, chosen // 4),
        **ports,
    )


def short_folder(home: Home) -> Path:
    """Ray's folder: under MORAY_HOME where Ray can work in that path, else a private one in /tmp."""
    folder = home.root / "ray" / "up"
    if not machine.holds_sockets(folder):
        name = hashlib.sha256(str(home.root).encode()).hexdigest()[:8]
        folder = Path(tempfile.gettempdir()) / f"moray-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to somebody else", "set MORAY_HOME to a shorter path, or TMPDIR")
    return folder


def _ray_start() -> list[str]:
    import sys

    # `ray start` as a module: the `ray` command may not be on the path of a service.
    return [
        sys.executable,
        "-P",
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--disable-usage-stats",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--include-log-monitor=false",
    ]
