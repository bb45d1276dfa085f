"""The HTTP routes of the page: static files, login, and streams of live updates.

The page consists of plain files in platform/server/page/, read once when the server starts. It needs no build and no
external resources. Only `/login` works without the token, so the login page is a single file; its content security
policy allows exactly its own script and style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from moray.platform.control.auth import COOKIE
from moray.platform.control.jobs import Job, Jobs, NotFoundError
from moray.platform.server.page_files import PAGE, page_file
from moray.platform.server.run_state import RunViews
from moray.platform.server.streams import Streams

_TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".woff2": "font/woff2", ".txt": "text/plain; charset=utf-8",
}  # fmt: skip
_LOGIN_SECONDS = 30 * 24 * 3600


class Login(BaseModel):
    token: str = Field(max_length=1000)


@dataclass(frozen=True)
class _File:
    data: bytes
    type: str
    etag: str

    def answer(self, request: Request, **headers: str) -> Response:
        kept = {"ETag": self.etag, "Cache-Control": "no-cache", **headers}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=kept)
        return Response(self.data, media_type=self.type, headers=kept)


def page_router(
    token: str,
    overview: Callable[[], dict[str, Any]],
    jobs: Jobs,
    views: RunViews,
    stopping: Callable[[], bool] = lambda: False,
) -> APIRouter:
    """Routes of the page, as documented in docs/http-api.md. `stopping`: the server shuts down, so streams must end."""
    router = APIRouter()
    _add_login(router, token)
    _add_files(router)
    _add_run(router, jobs, views)
    _add_streams(router, Streams(stopping), with_progress(overview, jobs, views), jobs, views)
    return router


def _add_login(router: APIRouter, token: str) -> None:
    form = _read(page_file("login.html"))
    policy = _login_policy(form.data.decode())

    @router.get("/login", include_in_schema=False)
    def show(request: Request) -> Response:
        return form.answer(request, **{"Content-Security-Policy": policy})

    @router.post("/login")
    def login(credentials: Login, request: Request) -> Response:
        if not hmac.compare_digest(credentials.token.strip().encode(), token.encode()):
            hint = "the token is in $MORAY_HOME/token and in the address printed by `moray up`"
            return JSONResponse({"error": "wrong token", "hint": hint}, 401)
        answer = Response(status_code=204)
        answer.set_cookie(
            COOKIE,
            token,
            max_age=_LOGIN_SECONDS,
            path="/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    @router.post("/logout")
    def logout() -> Response:
        answer = Response(status_code=204)
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer


def _add_files(router: APIRouter) -> None:
    files = {path.name: _read(path) for path in sorted(PAGE.iterdir()) if path.suffix in _TYPES}

    def shell(request: Request) -> Response:
        return files["index.html"].answer(request)

    for path in ("/", "/jobs/{name}", "/schedules", "/deployments", "/deployments/{name}"):
        router.add_api_route(path, shell, methods=["GET"], include_in_schema=False)

    @router.get("/static/{name}", include_in_schema=False)
    def static(name: str, request: Request) -> Response:
        if name not in files:
            raise NotFoundError(f"the page has no file {name!r}")
        return files[name].answer(request)


def with_progress(overview: Callable[[], dict[str, Any]], jobs: Jobs, views: RunViews) -> Callable[[], dict[str, Any]]:
    """Returns a function that adds `run`, the progress of each running job (`RunViews.brief`), to the overview."""

    def overview_with_progress() -> dict[str, Any]:
        state = overview()
        running = [job | {"run": views.brief(jobs.get(job["id"]))} for job in state["running"]]
        return state | {"running": running}

    return overview_with_progress


def _add_run(router: APIRouter, jobs: Jobs, views: RunViews) -> None:
    @router.get("/api/jobs/{name}/run")
    def run(name: str, attempt: int | None = None) -> Response:
        return JSONResponse(_view(jobs.get(name), attempt, views))


def _add_streams(
    router: APIRouter, streams: Streams, overview: Callable[[], dict[str, Any]], jobs: Jobs, views: RunViews
) -> None:
    @router.get("/api/stream")
    async def watch_all() -> Response:
        return _stream(streams.listen("overview", "overview", overview))

    @router.get("/api/jobs/{name}/stream")
    async def watch_run(name: str, attempt: int | None = None) -> Response:
        job = await run_in_threadpool(jobs.get, name)
        await run_in_threadpool(_view, job, attempt, views)  # rejects an unknown attempt before the stream starts
        snapshot = lambda: _view(jobs.get(job.id), attempt, views)  # noqa: E731
        return _stream(streams.listen((job.id, attempt), "run", snapshot))


def _view(job: Job, number: int | None, views: RunViews) -> dict[str, Any]:
    """The run of the attempt with this number, by default of the latest."""
    chosen = job.attempt(number)
    return views.view(job, chosen.id) if chosen and number is not None else views.view(job)


def _stream(chunks: AsyncIterator[bytes]) -> Response:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)


def _read(path: Path) -> _File:
    data = path.read_bytes()
    return _File(data, _TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:20]}"')


def _login_policy(html: str) -> str:
    """Content security policy that allows only the login page's own script and style, by their hashes."""
    inside = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("script", "style")}
    allowed = {tag: " ".join(f"'sha256-{_digest(text)}'" for text in found) for tag, found in inside.items()}
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
