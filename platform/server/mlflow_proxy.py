"""Reverse proxy from `/mlflow/...` to MLflow's server, behind the control plane's token.

MLflow listens on a Unix socket in a folder of mode 0700, so the proxy is the only access for other users.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

# Hop-by-hop headers and headers of the control plane are not forwarded; in particular, MLflow never sees the token.
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization", "host"}
_OURS = {"authorization", "cookie", "content-length", "accept-encoding"}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]
_CHUNK = 64 << 10
_MOST_BODY = 64 << 20  # largest artifact upload in bytes, held in memory


def mlflow_router(socket: Path) -> APIRouter:
    """Routes under /mlflow."""
    router = APIRouter()

    @router.api_route("/mlflow/{path:path}", methods=_METHODS, include_in_schema=False, max_body_size=_MOST_BODY)
    async def forward(path: str, request: Request) -> Response:
        session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket)), auto_decompress=False)
        sent = {name: value for name, value in request.headers.items() if name.lower() not in _HOP | _OURS}
        try:
            answer = await session.request(
                request.method,
                f"http://localhost/mlflow/{path}",
                params=str(request.url.query) or None,
                headers={**sent, "Host": "localhost"},
                data=await request.body(),
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            await session.close()
            hint = "it may still be starting; see `moray status`"
            return JSONResponse({"error": f"MLflow does not answer: {type(error).__name__}", "hint": hint}, 503)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.content.iter_chunked(_CHUNK):
                    yield chunk
            finally:
                await session.close()

        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP | {"content-length"}}
        return StreamingResponse(body(), answer.status, kept)

    return router
