"""The Ray cluster of `moray up`: a head with 0 CPUs and one worker node, on this machine, with token authentication.

Drivers must survive the head, so they never run on it: a job requests the custom resource `moray_driver`, which only
the worker has. The head keeps its state in RocksDB. Killed and restarted at the same address, it recovers its jobs and
actors, and the worker and the drivers reconnect.

Ray cannot bind everything to loopback (its own processes communicate over the machine's address), so all of it requires
a token. Only the dashboard is bound to 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from moray.cluster import machine
from moray.platform.control.supervisor import Service, python
from moray.platform.core.atomic import create_bytes
from moray.platform.core.cluster import BackendUnreachableError
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.core.processes import marked, usable_cores

WORKER = "ray-worker"  # service
DRIVER = "moray_driver"  # custom resource; each job's driver takes one unit
_HEAD_STORE = 80_000_000  # bytes of shared memory; no Moray code runs on the head
_HEAD_MEMORY = 100_000_000
_SYSTEM_MEMORY = 2 << 30  # reserved for Ray's own processes and the control plane


class LocalOptions(BaseModel):
    """The options of `moray up` for this MORAY_HOME; saved, so that a restart uses the same cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_port: int
    dashboard_port: int
    client_port: int
    cpus: int = Field(ge=1)
    gpus: int = Field(ge=0)
    memory_bytes: int
    slots: int = Field(ge=1)


class LocalCluster:
    """The services of the local cluster, and its addresses."""

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

    @property
    def _state(self) -> Path:
        """The database of Ray's head."""
        return self.home.up / "gcs"

    def environment(self) -> Mapping[str, str]:
        """Returns the environment for processes that connect to this cluster."""
        return {
            **machine.ray_environment(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": self.address,
        }

    def services(self) -> list[Service]:
        """Returns the services in start order: head, worker, and the usage log."""
        import secrets

        create_bytes(self.token, secrets.token_hex(32).encode())
        environment = {
            **self.environment(),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self._state),
            "RAY_JOB_START_TIMEOUT_SECONDS": "300",  # after Moray's own timeout, Ray drops unstarted jobs
            "RAY_JOB_STOP_WAIT_TIME_S": "30",  # time for a stopped driver to finish its writes
        }
        environment.pop("RAY_ADDRESS")  # `ray start` refuses it
        usage_environment = {**self.environment(), "MORAY_HOME": str(self.home.root)}
        return [
            Service(
                "ray-head",
                self._head(),
                environment,
                self._head_responds,
                prepare=self._prepare_head,
                answers=self._head_responds,
            ),
            Service(
                WORKER,
                self._worker(),
                environment,
                self._worker_is_alive,
                after=["ray-head"],
                answers=lambda: not self._head_responds() or self._worker_is_alive(),
            ),
            Service(
                "ray-watch",
                python("moray.cluster.usage_log", self.address),
                usage_environment,
                self._usage_is_fresh,
                after=["ray-head"],
                answers=lambda: not self._head_responds() or self._usage_is_fresh(),
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

    def _prepare_head(self) -> None:
        """Deletes Ray's address file: with it and a live worker, `ray start --head` assumes a running cluster.

        Without a worker, no driver or actor of the old cluster is left, so its state is deleted too. Ray would read
        from it that actors which ended with their node are alive, and wait for them forever.
        """
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        if not marked(self.home.root, WORKER):
            shutil.rmtree(self._state, ignore_errors=True)

    def _head_responds(self) -> bool:
        return self._get("/api/version") is not None

    def _worker_is_alive(self) -> bool:
        """Whether a node other than the head is alive."""
        body = self._get("/api/v0/nodes?detail=0")
        try:
            nodes = json.loads(body)["data"]["result"]["result"] if body else []
            return any(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)
        except (ValueError, LookupError, TypeError):  # another program on the dashboard's port
            return False

    def _usage_is_fresh(self) -> bool:
        """Whether the usage log was written recently."""
        from moray.cluster.usage_log import read_usage

        try:
            read_usage(self.home)
        except BackendUnreachableError:
            return False
        return True

    def _get(self, path: str) -> bytes | None:
        """Returns the body of a response from Ray's dashboard, or None on failure."""
        request = urllib.request.Request(self.dashboard + path)
        request.add_header("Authorization", f"Bearer {self.token.read_text().strip()}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
        try:
            with opener.open(request, timeout=5) as response:
                return bytes(response.read())
        except (OSError, http.client.HTTPException):
            return None


def default_options(
    ports: Mapping[str, int], *, cpus: int | None = None, gpus: int | None = None, slots: int | None = None
) -> LocalOptions:
    """Chooses options for this machine; None means automatic. Raises InputError if the machine lacks a resource."""
    for name, requested, least, available in (("cpus", cpus, 1, usable_cores()), ("gpus", gpus, 0, machine.gpus())):
        if requested is not None and not least <= requested <= available:
            hint = f"use {least} to {available}, or omit --{name}"
            raise InputError(f"--{name} {requested}: this machine has {available}", hint)
    if slots is not None and slots < 1:
        raise InputError(f"--slots {slots}: at least one slot is required", "use 1 or more")
    chosen = cpus or usable_cores()
    return LocalOptions(
        cpus=chosen,
        gpus=machine.gpus() if gpus is None else gpus,
        memory_bytes=machine.memory_bytes(),
        slots=slots or max(1, chosen // 4),
        **ports,
    )


def short_folder(home: Home) -> Path:
    """Returns Ray's folder: under MORAY_HOME if Ray can use that path, else a private one in /tmp."""
    folder = home.root / "ray" / "up"
    if not machine.usable_by_ray(folder):
        name = hashlib.sha256(str(home.root).encode()).hexdigest()[:8]
        folder = Path(tempfile.gettempdir()) / f"moray-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to another user", "set MORAY_HOME to a shorter path, or set TMPDIR")
    return folder


def _ray_start() -> list[str]:
    import sys

    # Run `ray start` as a module, because the `ray` command may not be on a service's path.
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
