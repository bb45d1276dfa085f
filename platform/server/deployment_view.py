"""A deployment as the HTTP API and the page show it."""

from __future__ import annotations

import time
from typing import Any

from moray.platform.control.controller import Controller
from moray.platform.control.deployments import Deployment
from moray.platform.control.serving_reports import summary


def deployment_json(deployment: Deployment, controller: Controller) -> dict[str, Any]:
    """A deployment with what its cluster reports: replicas, and the addresses of its hosts that answer."""
    serving = controller.serving_or_none(deployment.cluster)
    seen = serving.seen if serving else None
    one = seen.deployments.get(deployment.name) if seen else None
    replicas = [{"id": r.id, "state": r.state, "host": r.host} for r in one.replicas] if one else []
    return {
        **deployment.as_json(),
        "replicas_seen": replicas,
        "ready": sum(replica["state"] == "running" for replica in replicas),
        "served": summary(serving.reports.events(deployment), time.time()) if serving else None,
        "urls": _urls(seen.port, seen.host, seen.proxies) if seen and one else [],
    }


def _urls(port: int, host: str, proxies: tuple[str, ...]) -> list[str]:
    """The base addresses for clients, where proxies answer."""
    hosts = list(dict.fromkeys(proxies)) if host in ("0.0.0.0", "") else [host]
    return [f"http://{one}:{port}/v1" for one in hosts]
