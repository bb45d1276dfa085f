"""The HTTP routes of deployments, as documented in docs/http-api.md."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import aiohttp
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from moray.platform.control.controller import Controller
from moray.platform.control.deploying import make_deployment
from moray.platform.control.deployments import NewDeployment
from moray.platform.core.api_keys import page_key
from moray.platform.core.home import Home
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
        deployed, is_new = make_deployment(home, deployments, controller.serving(new.cluster), new)
        response.status_code = 201 if is_new else 200
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
        controller.check_rollback(name, request.to if request else None)
        changed = deployments.rollback(name, request.to if request else None)
        controller.wake()
        return deployment_json(changed, controller)

    @router.delete("/{name}", status_code=204)
    def remove(name: str, force: bool = False) -> None:
        deployments.remove(name, lost=force and controller.is_lost(deployments.get(name).cluster))

    @router.post("/{name}/completions")
    async def completions(name: str, request: Request) -> Response:
        """Forwards to the deployment's own /v1/completions, so that the page can try a model."""
        found = await run_in_threadpool(lambda: deployment_json(deployments.get(name), controller))
        if not found["urls"]:
            return JSONResponse({"error": f"deployment {name!r} is {found['state']}", "hint": found["reason"]}, 503)
        url = f"{found['urls'][0].removesuffix('/v1')}/{name}/v1/completions"
        return await _forwarded(url, await request.body(), page_key(home))

    return router


async def _forwarded(url: str, body: bytes, key: str) -> Response:
    """The response to a POST of JSON, streamed."""
    # A long answer takes longer than any fixed time; a server that says nothing for minutes is gone.
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300))
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        answer = await session.post(url, data=body, headers=headers)
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
