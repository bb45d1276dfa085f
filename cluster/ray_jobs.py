"""Attempts as Ray Jobs: the submission id is the attempt's id, and the driver never runs on the head."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from moray.cluster.local import DRIVER, LocalCluster
from moray.cluster.usage_log import read_usage
from moray.platform.core.cluster import BackendAwayError, ClusterBackend, ExecutorState, Observed, Usage

_SECONDS = 20.0
_STATES: Mapping[str, ExecutorState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayJobs(ClusterBackend):
    """Talks to a local cluster: Ray's documented REST API for jobs; the figures come from cluster/usage_log.py."""

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
        answer = self._ask("POST", "", body)
        if not answer.ok and "already exists" not in answer.text:
            raise BackendAwayError(f"Ray refused the job: {_last_line(answer.text)}")

    def observe(self) -> Mapping[str, Observed]:
        answer = self._ask("GET", "")
        if not answer.ok:
            raise BackendAwayError(f"Ray does not list its jobs: {_last_line(answer.text)}")
        found = [job for job in answer.json() if job["submission_id"]]
        return {job["submission_id"]: Observed(_STATES[job["status"]], _first_line(job["message"])) for job in found}

    def stop(self, attempt: str) -> None:
        self._ask("POST", f"{attempt}/stop")  # 404: it is unknown, or has just ended

    def forget(self, attempt: str) -> None:
        self._ask("DELETE", attempt)

    def usage(self) -> Usage:
        return read_usage(self._cluster.home)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the Jobs API."""
        import requests

        try:
            return self._session().request(
                method, f"{self._cluster.dashboard}/api/jobs/{path}", json=body, timeout=_SECONDS
            )
        except requests.RequestException as error:
            raise BackendAwayError(f"Ray's dashboard does not answer: {type(error).__name__}") from error

    def _session(self) -> Any:
        import requests

        if self._http is None:
            self._http = requests.Session()
            self._http.trust_env = False  # loopback needs no proxy
            self._http.headers["Authorization"] = f"Bearer {self._cluster.token.read_text().strip()}"
        return self._http


def _first_line(message: str | None) -> str:
    """What Ray says of a job; below it stand the ids of actors and nodes, or the end of the log."""
    return (message or "").strip().partition("\n")[0][:300]


def _last_line(text: str) -> str:
    """The error itself, out of the traceback that Ray answers with."""
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]
