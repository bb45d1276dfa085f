"""Runs attempts as Ray jobs, through Ray's REST API. The submission id is the attempt's id."""

from __future__ import annotations

import shlex
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from moray.cluster.local import DRIVER, LocalCluster
from moray.cluster.usage_log import read_usage
from moray.platform.core.cluster import (
    BackendRefusedError,
    BackendUnreachableError,
    ClusterBackend,
    ExecutorState,
    Observed,
    Usage,
)

_TIMEOUT_SECONDS = 20.0
_STATES: Mapping[str, ExecutorState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayJobs(ClusterBackend):
    """Client of the Jobs API at `address`, Ray's dashboard. trust_env: use the proxies of the environment."""

    def __init__(self, address: str, trust_env: bool) -> None:
        self._address, self._trust_env = address, trust_env
        self._http: Any = None

    @abstractmethod
    def token(self) -> str:
        """The token for Ray's token authentication; "" for none."""

    @abstractmethod
    def job(self, attempt: str, environment: Mapping[str, str]) -> dict[str, Any]:
        """The body of the request that submits an attempt, without its submission id."""

    def submit(self, attempt: str, environment: Mapping[str, str]) -> None:
        self.post_job(attempt, self.job(attempt, environment))

    def post_job(self, name: str, job: Mapping[str, Any]) -> None:
        """Submits a job under an id; no-op if it was submitted before."""
        response = self.request("POST", "/api/jobs/", {**job, "submission_id": name})
        if not response.ok and "already exists" not in response.text:
            raise BackendUnreachableError(f"Ray rejected the job: {_last_line(response.text)}")

    def observe(self) -> Mapping[str, Observed]:
        response = self.request("GET", "/api/jobs/")
        if not response.ok:
            raise BackendUnreachableError(f"Ray cannot list its jobs: {_last_line(response.text)}")
        try:
            return {job["submission_id"]: _observed(job) for job in response.json() if job["submission_id"]}
        except (ValueError, LookupError, TypeError) as error:
            raise BackendUnreachableError("the response is not that of Ray's dashboard") from error

    def stop(self, attempt: str) -> None:
        self.request("POST", f"/api/jobs/{attempt}/stop")  # 404: unknown, or just ended

    def forget(self, attempt: str) -> None:
        self.request("DELETE", f"/api/jobs/{attempt}")

    def request(self, method: str, path: str, body: Any = None, data: bytes | None = None) -> Any:
        """Sends one request to the dashboard; returns the response. Raises BackendUnreachableError."""
        import requests

        try:
            response = self._session().request(
                method, self._address + path, json=body, data=data, timeout=_TIMEOUT_SECONDS
            )
        except requests.RequestException as error:
            raise BackendUnreachableError(f"Ray's dashboard does not respond: {type(error).__name__}") from error
        if response.status_code in (401, 403):
            problem = "refuses the token" if self.token() else "requires a token"
            raise BackendRefusedError(f"Ray's dashboard {problem} (HTTP {response.status_code})")
        return response

    def _session(self) -> Any:
        import requests

        if self._http is None:
            session = requests.Session()
            session.trust_env = self._trust_env
            if token := self.token():
                session.headers["Authorization"] = f"Bearer {token}"
            self._http = session  # complete, because other threads use it at once
        return self._http


class LocalJobs(RayJobs):
    """Jobs of the cluster of `moray up`. Only its worker node has the resource that a driver requests, so that no
    driver runs on the head."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__(cluster.dashboard, trust_env=False)  # loopback needs no proxy
        self._cluster = cluster

    def token(self) -> str:
        return self._cluster.token.read_text().strip()

    def job(self, attempt: str, environment: Mapping[str, str]) -> dict[str, Any]:
        return {
            "entrypoint": driver_command([sys.executable], attempt),
            "runtime_env": {"env_vars": dict(environment)},
            "entrypoint_resources": {DRIVER: 1},
        }

    def usage(self) -> Usage:
        return read_usage(self._cluster.home)


def driver_command(python: Sequence[str], *arguments: str) -> str:
    """The command line of a driver."""
    return module_command(python, "moray.platform.control.driver", *arguments)


def module_command(python: Sequence[str], *arguments: str) -> str:
    """The command line of a module with its arguments. Nothing is imported from its current folder."""
    return shlex.join([*python, "-P", "-m", *arguments])


def _observed(job: Mapping[str, Any]) -> Observed:
    host = (job.get("driver_info") or {}).get("node_ip_address") or ""
    return Observed(_STATES[job["status"]], _reason(job["message"]), host)


def _reason(message: str | None) -> str:
    """The first line of Ray's message on a job; the rest is ids of actors and nodes. If the message contains the end of
    the log, the last line of it too, which is that of a traceback."""
    first, _, rest = (message or "").strip().partition("\n")
    what, is_log, _ = first.partition(", last available logs")
    last = (rest.strip().splitlines() or [""])[-1] if is_log else ""
    return f"{what}: {last}"[:300] if last else what[:300]


def _last_line(text: str) -> str:
    """The error message of a traceback that Ray returned."""
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]
