"""The HTTP routes of deployments, as documented in docs/http-api.md."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import aiohttp
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from moray.platform.control.controller import Controller
from moray.platform.control.deployments import NewDeployment
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.room import check_fit
from moray.platform.control.served_models import ServedModels
from moray.platform.core.cluster import BackendUnreachableError, Usage
from moray.platform.core.home import Home
from moray.platform.core.ports import check_port
from moray.platform.server.deployment_view import deployment_json


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
        return [deployment_json(one, controller) for one in deployments.all()]

    @router.post("", status_code=201)
    def deploy(new: NewDeployment, response: Response) -> dict[str, Any]:
        cluster = controller.cluster(new.cluster).cluster
        found = ServedModels(home, cluster).find(new.model)
        usage = _resources(cluster)
        gpus = int(usage.gpus) if usage else 0
        if usage:
            check_fit(new.options.resources(gpus), new.options.replicas, usage)
        known = {one.name for one in deployments.all()}
        _check_port(new, cluster, controller)
        named = new.model_copy(update={"model": found.model})
        serving = controller.serving(new.cluster)
        deployed = deployments.deploy(
            named, found.reference, found.folder, gpus, serving.reports.base if serving else ""
        )
        response.status_code = 200 if deployed.name in known else 201
        controller.wake()
        return deployment_json(deployed, controller)

    @router.get("/{name}")
    def show(name: str) -> dict[str, Any]:
        return deployment_json(deployments.get(name), controller)

    @router.get("/{name}/history")
    def history(name: str) -> list[dict[str, Any]]:
        return deployments.history(name)

    @router.get("/{name}/why")
    def why(name: str) -> dict[str, Any]:
        found = deployments.get(name)
        return {"id": found.name, "state": found.state, "lines": controller.why_deployment(found)}

    @router.post("/{name}/stop")
    def stop(name: str) -> dict[str, Any]:
        stopped = deployments.stop(name)
        controller.wake()
        return deployment_json(stopped, controller)

    @router.post("/{name}/rollback")
    def rollback(name: str, request: Annotated[Rollback | None, "the version"] = None) -> dict[str, Any]:
        changed = deployments.rollback(name, request.to if request else None)
        controller.wake()
        return deployment_json(changed, controller)

    @router.delete("/{name}", status_code=204)
    def remove(name: str) -> None:
        deployments.remove(name)

    @router.post("/{name}/completions")
    async def completions(name: str, request: Request) -> Response:
        """Forwards to the deployment's own /v1/completions, so that the page can try a model."""
        found = await run_in_threadpool(lambda: deployment_json(deployments.get(name), controller))
        if not found["urls"]:
            return JSONResponse({"error": f"deployment {name!r} is {found['state']}", "hint": found["reason"]}, 503)
        return await _forwarded(f"{found['urls'][0].removesuffix('/v1')}/{name}/v1/completions", await request.body())

    return router


async def _forwarded(url: str, body: bytes) -> Response:
    """The response to a POST of JSON, streamed."""
    # A long answer takes longer than any fixed time; a server that says nothing for minutes is gone.
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300))
    try:
        answer = await session.post(url, data=body, headers={"Content-Type": "application/json"})
    except (aiohttp.ClientError, OSError) as error:
        await session.close()
        return JSONResponse({"error": f"{url} does not answer: {type(error).__name__}", "hint": "try again"}, 503)

    async def parts() -> AsyncIterator[bytes]:
        try:
            async for part in answer.content.iter_any():
                yield part
        finally:
            await session.close()

    return StreamingResponse(parts(), answer.status, media_type=answer.headers.get("Content-Type"))


def _check_port(new: NewDeployment, cluster: ManagedCluster, controller: Controller) -> None:
    """Raises InputError if Serve of this machine would have to move to a port that is in use."""
    serving = controller.serving(new.cluster)
    current = serving.seen.port if serving and serving.seen else 0
    if new.port and new.port != current and cluster.serving and not cluster.store:
        check_port(cluster.serving.host, new.port)


def _resources(cluster: ManagedCluster) -> Usage | None:
    """The resources of a cluster; None while it does not respond: then its deployments wait for it."""
    if not cluster.store:  # its workers may still be starting
        has = cluster.topology()
        return Usage(has.cpus, 0.0, has.gpus, 0.0, 1, memory_bytes=has.memory_bytes)
    with contextlib.suppress(BackendUnreachableError):
        return cluster.backend.usage()
    return None
