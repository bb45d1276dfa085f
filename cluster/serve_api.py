"""Deployments on Ray Serve, through the REST API of Ray's dashboard.

Serve's controller keeps what it was told in Ray's state, so deployments survive its death and that of Ray's head. It
replaces a version replica by replica: the new one starts before the old one stops (`application.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moray.cluster.existing import ExistingJobs
from moray.cluster.machine import SERVE_ENVIRONMENT
from moray.cluster.ray_jobs import RayJobs
from moray.platform.core.cluster import BackendUnreachableError
from moray.platform.core.serving import (
    PREFIX,
    UNIT,
    DeploymentSeen,
    ReplicaSeen,
    ServeOrder,
    ServingBackend,
    ServingSeen,
    reason_in,
)

_PATH = "/api/serve/applications/"
_BUILDER = "moray.pipelines.serve.application:build_by_name"
_START = "moray.pipelines.serve.start"
_POLICY = "moray.pipelines.serve.scaling:TokensPolicy"
_UPSCALE_SECONDS, _DOWNSCALE_SECONDS, _LOOK_BACK_SECONDS = 5.0, 120.0, 10.0
_QUIET = {"encoding": "TEXT", "log_level": "WARNING", "enable_access_log": False}

State = Literal["starting", "running", "degraded", "failed", "removing"]
_STATES: Mapping[str, State] = {
    "NOT_STARTED": "starting",
    "DEPLOYING": "starting",
    "RUNNING": "running",
    "UNHEALTHY": "degraded",
    "DEPLOY_FAILED": "failed",
    "DELETING": "removing",
}


class ServeApi(ServingBackend):
    """The Serve instance behind a dashboard. host: where its proxies listen."""

    def __init__(self, jobs: RayJobs, host: str) -> None:
        self._jobs = jobs
        self.host = host

    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment of replicas."""
        return {}

    def start(self, port: int) -> bool:
        """Starts Serve if telling it what to run does not. Returns whether it can be told now."""
        return True

    def observe(self) -> ServingSeen:
        details = self._details()
        if not _runs(details):
            return ServingSeen()
        options, applications = details["http_options"], details["applications"]
        return ServingSeen(
            host=options["host"],
            port=options["port"],
            proxies=tuple(one["node_ip"] for one in details["proxies"].values() if one["status"] == "HEALTHY"),
            deployments={
                name.removeprefix(PREFIX): _seen(one) for name, one in applications.items() if name.startswith(PREFIX)
            },
            others=sum(not name.startswith(PREFIX) for name in applications),
        )

    def apply(self, port: int, orders: Sequence[ServeOrder]) -> None:
        details = self._details()
        if not _runs(details) and not self.start(port):
            return
        kept = [
            one["deployed_app_config"]
            for name, one in details["applications"].items()
            if not name.startswith(PREFIX) and one["source"] == "declarative" and one["status"] != "DELETING"
        ]
        environment = self.runtime_env()
        body = {
            "proxy_location": "EveryNode",
            "http_options": {"host": self.host, "port": port},
            "controller_options": {"runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
            "logging_config": _QUIET,
            "applications": [*kept, *(_application(order, environment) for order in orders)],
        }
        self._checked(self._jobs.request("PUT", _PATH, body))

    def shut_down(self) -> None:
        self._checked(self._jobs.request("DELETE", _PATH))

    def _details(self) -> dict[str, Any]:
        response = self._checked(self._jobs.request("GET", _PATH))
        try:
            found: dict[str, Any] = response.json()
            found["applications"]
        except (ValueError, LookupError, TypeError) as error:
            raise BackendUnreachableError("the response is not that of Ray's dashboard") from error
        return found

    def _checked(self, response: Any) -> Any:
        if not response.ok:
            lines = response.text.strip().splitlines() or [f"HTTP {response.status_code}"]
            raise BackendUnreachableError(f"Ray Serve: {lines[-1][:300]}")
        return response


class ExistingServe(ServeApi):
    """The Serve instance of the cluster of a profile. A short job starts it, so that its proxies have Moray's code,
    which may not be installed on the cluster's hosts."""

    def __init__(self, jobs: ExistingJobs) -> None:
        super().__init__(jobs, "0.0.0.0")
        self._existing = jobs
        self._starting = ""  # the job

    def runtime_env(self) -> dict[str, Any]:
        return self._existing.runtime_env(SERVE_ENVIRONMENT)

    def start(self, port: int) -> bool:
        if not self._starting:
            name = f"moray-serve-{secrets.token_hex(4)}"
            self._existing.submit_command(name, [_START, self.host, str(port)], SERVE_ENVIRONMENT)
            self._starting = name
            return False
        state = self._existing.observe().get(self._starting)
        if state is not None and state.state in ("pending", "running"):
            return False
        ended, self._starting = self._starting, ""
        if state is not None:
            self._existing.forget(ended)
            if state.state != "succeeded":
                raise BackendUnreachableError(f"Ray Serve did not start: {state.detail or state.state}")
        return False  # the next report shows it


def _runs(details: Mapping[str, Any]) -> bool:
    return bool((details.get("controller_info") or {}).get("actor_id")) and details.get("http_options") is not None


def _application(order: ServeOrder, runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": f"{PREFIX}{order.name}",
        "route_prefix": f"/{order.name}",
        "import_path": _BUILDER,
        "args": dict(order.arguments),
        "runtime_env": dict(runtime_env),
        "deployments": [{"name": UNIT, **_scale(order), **_settings(order)}],
    }


def _settings(order: ServeOrder) -> dict[str, Any]:
    return {} if order.settings is None else {"user_config": dict(order.settings)}


def _scale(order: ServeOrder) -> dict[str, Any]:
    if order.most_replicas <= order.replicas:
        return {"num_replicas": order.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": order.replicas,
            "max_replicas": order.most_replicas,
            "upscale_delay_s": _UPSCALE_SECONDS,
            "downscale_delay_s": _DOWNSCALE_SECONDS,
            "look_back_period_s": _LOOK_BACK_SECONDS,
            "policy": {"policy_function": _POLICY, "policy_kwargs": {"target": order.target_tokens}},
        }
    }


def _seen(application: Mapping[str, Any]) -> DeploymentSeen:
    units = list((application.get("deployments") or {}).values())
    replicas = [
        ReplicaSeen(one["replica_id"], one["state"].lower(), one.get("node_ip") or "")
        for unit in units
        for one in unit["replicas"]
    ]
    messages = [unit["message"] for unit in units if unit.get("message")]
    message = (messages or [application.get("message") or ""])[0]
    return DeploymentSeen(
        state=_STATES.get(application["status"], "starting"),
        message=reason_in(message) if message else "",
        order=_order(application),
        replicas=tuple(replicas),
    )


def _order(application: Mapping[str, Any]) -> ServeOrder | None:
    """The order that `_application` wrote."""
    config = application.get("deployed_app_config")
    if application["source"] != "declarative" or config is None:
        return None
    unit = (config.get("deployments") or [{}])[0]
    scale = unit.get("autoscaling_config") or {}
    least = scale.get("min_replicas", unit.get("num_replicas") or 1)
    most = scale.get("max_replicas", least)
    target = ((scale.get("policy") or {}).get("policy_kwargs") or {}).get("target", 0)
    name, arguments = config["name"].removeprefix(PREFIX), config.get("args") or {}
    return ServeOrder(name, arguments, least, most, target, unit.get("user_config"))
