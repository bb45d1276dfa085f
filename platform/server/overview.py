"""The data of the page's overview and of `moray status`: jobs, services, cluster, schedules."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import psutil

from moray.platform.control.choices import LOCAL
from moray.platform.control.cluster_rounds import ClusterRounds
from moray.platform.control.controller import Controller
from moray.platform.control.jobs import ENDED, IN_FLIGHT
from moray.platform.control.supervisor import read_state
from moray.platform.core.cluster import BackendUnreachableError, Usage
from moray.platform.core.home import Home
from moray.platform.server.deployment_view import deployment_json

_RECENT = 20
_SHOWN = 30  # jobs and schedules of each kind: every page gets them all
_DAY = 86400.0
_USAGE_SECONDS = 2.0
_SHOWN_HOSTS = 10
_NO_USAGE = Usage(cpus=0.0, cpus_used=0.0, gpus=0.0, gpus_used=0.0, nodes=0)


class Overview:
    """Callable that returns the overview documented in docs/http-api.md. Cluster usage is cached for two seconds."""

    def __init__(self, home: Home, controller: Controller) -> None:
        self._home = home
        self._controller = controller
        self._lock = threading.Lock()
        self._queried = 0.0
        self._cluster: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        import moray

        jobs, now = self._controller.jobs, time.time()
        counts = jobs.open_counts()
        return {
            "version": moray.__version__,  # type: ignore[attr-defined]
            "now": now,
            "slots": self._controller.slots,
            "waiting": sum(n for (_, state), n in counts.items() if state == "queued"),
            "active": sum(n for (_, state), n in counts.items() if state in IN_FLIGHT),
            "queued": [job.as_json() for job in jobs.queue(_SHOWN)],
            "running": [job.as_json() for job in jobs.list(IN_FLIGHT, limit=_SHOWN)],
            "recent": [job.as_json() for job in jobs.list(ENDED, limit=_RECENT)],
            "counts": jobs.counts_since(now - _DAY),
            "services": self._services(),
            "cluster": self._usage(),
            "clusters": self._clusters(counts),
            "schedules": self._schedules(),
            "deployments": self._deployments(),
        }

    def _services(self) -> list[dict[str, Any]]:
        known = read_state(self._home)
        order = ["supervisor", *(name for name in known if name != "supervisor")]
        return [
            {name: value for name, value in asdict(known[key]).items() if name != "started"}
            for key in order
            if key in known
        ]

    def _schedules(self) -> list[dict[str, Any]]:
        """The schedules that tick next."""
        found = [self._controller.schedules.as_json(one) for one in self._controller.schedules.list()]
        return sorted(found, key=lambda one: (one["next"] is None, one["next"], one["name"]))[:_SHOWN]

    def _deployments(self) -> list[dict[str, Any]]:
        """All deployments, stopped ones last."""
        found = [deployment_json(one, self._controller) for one in self._controller.deployments.all()]
        return sorted(found, key=lambda one: (one["state"] == "stopped", one["name"]))[:_SHOWN]

    def _clusters(self, counts: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
        """The clusters that have been used since the start, and those that jobs wait for."""
        found = self._controller.clusters()
        return [
            {
                "name": name,
                "where": found[name].cluster.where if name in found else "",
                "slots": found[name].cluster.slots if name in found else 0,
                "running": sum(counts.get((name, state), 0) for state in IN_FLIGHT),
                "queued": counts.get((name, "queued"), 0),
                "error": found[name].error if name in found else self._controller.problem(name),
                **(_use(found[name]) if name in found else {}),
            }
            for name in [*found, *sorted({cluster for cluster, _ in counts} - set(found))]
        ]

    def _usage(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() - self._queried > _USAGE_SECONDS:
                self._cluster = self._query()
                self._queried = time.monotonic()
            return self._cluster

    def _query(self) -> dict[str, Any]:
        memory = psutil.virtual_memory()
        local = {"memory_bytes": memory.total, "memory_used_bytes": memory.total - memory.available}
        try:
            usage = self._controller.cluster(LOCAL).cluster.backend.usage()
        except BackendUnreachableError as error:
            return {"alive": False, **asdict(_NO_USAGE), **local, "detail": str(error)}
        detail = f"pending demand: {', '.join(usage.waiting)}" if usage.waiting else ""
        return {"alive": True, **asdict(usage), **local, "detail": detail}


def _use(cluster: ClusterRounds) -> dict[str, Any]:
    """Resources and hosts of a cluster other than the local one: dead hosts and those with drivers first."""
    usage = cluster.usage
    if usage is None:
        return {}
    drivers: dict[str, list[str]] = {}
    for attempt, host in sorted(cluster.drivers.items()):
        drivers.setdefault(host, []).append(attempt)
    hosts = sorted(usage.hosts, key=lambda host: (host.alive, host.address not in drivers))
    shown = [asdict(host) | {"drivers": drivers.get(host.address, [])[:_SHOWN_HOSTS]} for host in hosts[:_SHOWN_HOSTS]]
    totals = {name: value for name, value in asdict(usage).items() if name not in ("hosts", "waiting")}
    return {"usage": totals | {"waiting": list(usage.waiting[:_SHOWN_HOSTS]), "hosts": shown}}
