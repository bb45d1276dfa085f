"""The data of the page's overview and of `moray status`: jobs, services, cluster, schedules."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import psutil

from moray.platform.control.choices import LOCAL
from moray.platform.control.controller import Controller
from moray.platform.control.jobs import ENDED, Job
from moray.platform.control.queue import IN_FLIGHT, in_order
from moray.platform.control.supervisor import read_state
from moray.platform.core.cluster import BackendUnreachableError, Usage
from moray.platform.core.home import Home

_RECENT = 20
_DAY = 86400.0
_USAGE_SECONDS = 2.0
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

        jobs = self._controller.jobs
        unfinished = jobs.open()
        now = time.time()
        return {
            "version": moray.__version__,  # type: ignore[attr-defined]
            "now": now,
            "slots": self._controller.slots,
            "queued": [job.as_json() for job in in_order(unfinished)],
            "running": [job.as_json() for job in unfinished if job.state in IN_FLIGHT],
            "recent": [job.as_json() for job in jobs.list(ENDED, limit=_RECENT)],
            "counts": jobs.counts_since(now - _DAY),
            "services": self._services(),
            "cluster": self._usage(),
            "clusters": self._clusters(unfinished),
            "schedules": [self._controller.schedules.as_json(s) for s in self._controller.schedules.list()],
        }

    def _services(self) -> list[dict[str, Any]]:
        known = read_state(self._home)
        order = ["supervisor", *(name for name in known if name != "supervisor")]
        return [
            {name: value for name, value in asdict(known[key]).items() if name != "started"}
            for key in order
            if key in known
        ]

    def _clusters(self, unfinished: Sequence[Job]) -> list[dict[str, Any]]:
        """The clusters that have been used since the start, and those that jobs wait for."""
        found = self._controller.clusters()
        return [
            {
                "name": name,
                "where": found[name].cluster.where if name in found else "",
                "slots": found[name].cluster.slots if name in found else 0,
                "running": sum(job.cluster == name and job.state in IN_FLIGHT for job in unfinished),
                "queued": sum(job.cluster == name and job.state == "queued" for job in unfinished),
                "error": found[name].error if name in found else self._controller.problem(name),
            }
            for name in [*found, *sorted({job.cluster for job in unfinished} - set(found))]
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
