"""The services of the control plane in start order: Ray's head, worker and usage log, MLflow, the controller.

Part of the composition root, because it connects the control plane to the cluster that it runs on.
"""

from __future__ import annotations

import http.client
import shlex
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from moray.cluster.local import LocalCluster, short_folder
from moray.platform.control.auth import ensure_token
from moray.platform.control.options import UpOptions, url
from moray.platform.control.supervisor import Service, python
from moray.platform.core.home import Home
from moray.platform.run.mlflow_tracking import database_uri

# Disables telemetry and the seven processes of MLflow's own job execution, which Moray does not use.
_MLFLOW_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def services(home: Home, options: UpOptions) -> list[Service]:
    """Returns all services in start order."""
    cluster = LocalCluster(home, options.cluster)
    environment = {**cluster.environment(), "MORAY_HOME": str(home.root)}
    ensure_token(home)
    return [
        *cluster.services(),
        Service(
            "mlflow",
            _mlflow(home),
            {**environment, **_MLFLOW_ENVIRONMENT},
            lambda: _answers(mlflow_socket(home)),
            answers=lambda: _answers(mlflow_socket(home)),
        ),
        Service(
            "controller",
            python("moray.platform.server.app"),
            environment,
            lambda: healthy(options),
            after=["ray-head"],
            answers=lambda: healthy(options),
        ),
    ]


def healthy(options: UpOptions) -> bool:
    """Whether the controller answers on its port."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url(options)}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # nothing listens, or another program that does not speak HTTP
        return False


def mlflow_socket(home: Home) -> Path:
    """MLflow's socket. It is in the private folder of Ray's sockets, because socket paths must be short."""
    return Path(short_folder(home)) / "mlflow.sock"


def _mlflow(home: Home) -> list[str]:
    """The command of MLflow's server. It needs no host name check, because the folder of its socket is private."""
    return [
        sys.executable,
        "-P",
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        database_uri(home),
        "--default-artifact-root",
        home.mlflow_artifacts.as_uri(),
        "--static-prefix",
        "/mlflow",
        "--workers",
        "1",
        "--uvicorn-opts",
        f"--uds {shlex.quote(str(mlflow_socket(home)))} --log-level warning",
    ]


def _answers(path: Path) -> bool:
    """Whether an HTTP server answers on a socket. A successful connect alone proves nothing: the kernel accepts it."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
            probe.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return probe.recv(5) == b"HTTP/"
        except OSError:
            return False
