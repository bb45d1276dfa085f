"""The HTTP routes of deployments, as documented in docs/http-api.md."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from moray.platform.control.controller import Controller
from moray.platform.control.deployments import Deployment, NewDeployment
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.room import check_fit
from moray.platform.control.served_models import ServedModels
from moray.platform.control.serving_reports import summary
from moray.platform.core.cluster import BackendUnreachableError, Usage
from moray.platform.core.home import Home


class Rollback(BaseModel):
    """to: the version to return to; by default the one before."""

    model_config = ConfigDict(extra="forbid")

    to: int | None = Field(None, ge=1)


def deployment_router(home: Home, controller: Controller) -> APIRouter:
    """Routes under `/api/deployments`."""
    router = APIRouter(prefix="/api/deployments")
    deployments = controller.deployments

    @router.get("")
    def list_() -> list[dict[str, Any]]:
        return [_as_json(one, controller) for one in deployments.all()]

    @router.post("", status_code=201)
    def deploy(new: NewDeployment, response: Response) -> dict[str, Any]:
        cluster = controller.cluster(new.cluster).cluster
        found = ServedModels(home, cluster).find(new.model)
        usage = _resources(cluster)
        gpus = int(usage.gpus) if usage else 0
        if usage:
            check_fit(new.options.resources(gpus), new.options.replicas, usage)
        known = {one.name for one in deployments.all()}
        named = new.model_copy(update={"model": found.model})
        serving = controller.serving(new.cluster)
        deployed = deployments.deploy(
            named, found.reference, found.folder, gpus, serving.reports.base if serving else ""
        )
        response.status_code = 200 if deployed.name in known else 201
        controller.wake()
        return _as_json(deployed, controller)

    @router.get("/{name}")
    def show(name: str) -> dict[str, Any]:
        return _as_json(deployments.get(name), controller)

    @router.get("/{name}/history")
    def history(name: str) -> list[dict[str, Any]]:
        return deployments.history(name)

    @router.post("/{name}/stop")
    def stop(name: str) -> dict[str, Any]:
        stopped = deployments.stop(name)
        controller.wake()
        return _as_json(stopped, controller)

    @router.post("/{name}/rollback")
    def rollback(name: str, request: Annotated[Rollback | None, "the version"] = None) -> dict[str, Any]:
        changed = deployments.rollback(name, request.to if request else None)
        controller.wake()
        return _as_json(changed, controller)

    @router.delete("/{name}", status_code=204)
    def remove(name: str) -> None:
        deployments.remove(name)

    return router


def _resources(cluster: ManagedCluster) -> Usage | None:
    """The resources of a cluster; None while it does not respond: then its deployments wait for it."""
    if not cluster.store:  # its workers may still be starting
        has = cluster.topology()
        return Usage(has.cpus, 0.0, has.gpus, 0.0, 1, memory_bytes=has.memory_bytes)
    with contextlib.suppress(BackendUnreachableError):
        return cluster.backend.usage()
    return None


def _as_json(deployment: Deployment, controller: Controller) -> dict[str, Any]:
    """A deployment with what its cluster reports: replicas, and the addresses of its hosts that answer."""
    serving = controller.serving(deployment.cluster)
    seen = serving.seen if serving else None
    one = seen.deployments.get(deployment.name) if seen else None
    replicas = [{"id": r.id, "state": r.state, "host": r.host} for r in one.replicas] if one else []
    return {
        **deployment.as_json(),
        "replicas_seen": replicas,
        "ready": sum(replica["state"] == "running" for replica in replicas),
        "served": summary(serving.reports.events(deployment.name), time.time()) if serving else None,
        "urls": _urls(deployment, seen.host if seen else "", seen.proxies if seen else ()),
    }


def _urls(deployment: Deployment, host: str, proxies: tuple[str, ...]) -> list[str]:
    """The base addresses for clients, where proxies answer."""
    hosts = list(dict.fromkeys(proxies)) if host in ("0.0.0.0", "") else [host]
    return [f"http://{one}:{deployment.port}/v1" for one in hosts]
