"""Runs attempts as Ray jobs. The submission id is the attempt's id, and the driver never runs on the head."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from moray.cluster.local import DRIVER, LocalCluster
from moray.cluster.usage_log import read_usage
from moray.platform.core.cluster import BackendUnreachableError, ClusterBackend, ExecutorState, Observed, Usage

_TIMEOUT_SECONDS = 20.0
_STATES: Mapping[str, ExecutorState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayJobs(ClusterBackend):
    """Client of a local cluster: uses Ray's REST API for jobs, and cluster/usage_log.py for resource usage."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._http: Any = None

    def submit(self, attempt: str, environment: Mapping[str, str]) -> None:
        body = {
            "entrypoint": shlex.join([sys.executable, "-P", "-m", "moray.platform.control.driver", attempt]),
            "submission_id": attempt,
            "runtime_env": {"env_vars": dict(environment)},
            "entrypoint_resources": {DRIVER: 1},
        }
        response = self._request("POST", "", body)
        if not response.ok and "already exists" not in response.text:
            raise BackendUnreachableError(f"Ray rejected the job: {_last_line(response.text)}")

    def observe(self) -> Mapping[str, Observed]:
        response = self._request("GET", "")
        if not response.ok:
            raise BackendUnreachableError(f"Ray cannot list its jobs: {_last_line(response.text)}")
        found = [job for job in response.json() if job["submission_id"]]
        return {job["submission_id"]: Observed(_STATES[job["status"]], _first_line(job["message"])) for job in found}

    def stop(self, attempt: str) -> None:
        self._request("POST", f"{attempt}/stop")  # 404: unknown, or just ended

    def forget(self, attempt: str) -> None:
        self._request("DELETE", attempt)

    def usage(self) -> Usage:
        return read_usage(self._cluster.home)

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        """Sends one request to the Jobs API."""
        import requests

        try:
            return self._session().request(
                method, f"{self._cluster.dashboard}/api/jobs/{path}", json=body, timeout=_TIMEOUT_SECONDS
            )
        except requests.RequestException as error:
            raise BackendUnreachableError(f"Ray's dashboard does not respond: {type(error).__name__}") from error

    def _session(self) -> Any:
        import requests

        if self._http is None:
            self._http = requests.Session()
            self._http.trust_env = False  # loopback needs no proxy
            self._http.headers["Authorization"] = f"Bearer {self._cluster.token.read_text().strip()}"
        return self._http


def _first_line(message: str | None) -> str:
    """The first line of Ray's message on a job; the rest is ids of actors and nodes, or the end of the log."""
    return (message or "").strip().partition("\n")[0][:300]


def _last_line(text: str) -> str:
    """The error message of a traceback that Ray returned."""
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]
