"""The controller process, a service of `moray up`: `python -m moray.platform.server.app`.

It runs the control loop (controller.py) and the HTTP server. A file lock makes it the only writer of `moray.db`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from moray.cluster.local import LocalCluster
from moray.cluster.managed import find_cluster, local_cluster
from moray.platform.control.auth import TokenRequired, ensure_token
from moray.platform.control.controller import Controller
from moray.platform.control.database import Database
from moray.platform.control.jobs import ConflictError, NotFoundError
from moray.platform.control.options import HOST, UpOptions
from moray.platform.control.services import mlflow_socket
from moray.platform.core.errors import InputError, MorayError, StoreUnreachableError, UnavailableError, nearest
from moray.platform.core.home import Home
from moray.platform.server import deployment_routes, job_routes, mlflow_proxy, page_routes, schedule_routes
from moray.platform.server.overview import Overview
from moray.platform.server.run_state import RunViews
from moray.platform.server.security_headers import PageGuard

MOST_BODY = 4 << 20  # largest request body in bytes, on all routes except MLflow's


def build_controller_app(
    home: Home,
    controller: Controller,
    overview: Callable[[], dict[str, Any]],
    token: str,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Builds the app with all routes of docs/http-api.md. `stopping`: whether the server is shutting down."""
    import moray

    app = FastAPI(
        title="Moray",
        version=moray.__version__,  # type: ignore[attr-defined]
        docs_url=None,
        redoc_url=None,
        max_body_size=MOST_BODY,
    )

    views = RunViews(home)
    overview_with_progress = page_routes.with_progress(overview, controller.jobs, views)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "version": app.version, "home": str(home.root)}

    app.get("/api/overview")(overview_with_progress)
    app.include_router(job_routes.job_router(home, controller))
    app.include_router(schedule_routes.schedule_router(controller.schedules, controller.cluster, controller.wake))
    app.include_router(deployment_routes.deployment_router(home, controller))
    app.include_router(page_routes.page_router(token, overview, controller.jobs, views, stopping))
    app.include_router(mlflow_proxy.mlflow_router(mlflow_socket(home)))
    _install_errors(app)
    app.add_middleware(TokenRequired, token=token)
    app.add_middleware(PageGuard)  # added last, so it runs first
    return app


def _install_errors(app: FastAPI) -> None:
    """Makes every error a JSON body `{"error", "hint"}` with a matching status."""

    @app.exception_handler(MorayError)
    def moray_error(request: Request, error: MorayError) -> JSONResponse:
        status = {NotFoundError: 404, ConflictError: 409, UnavailableError: 503, StoreUnreachableError: 503}.get(
            type(error), 422
        )
        return JSONResponse({"error": error.message, "hint": error.hint}, status)

    @app.exception_handler(RequestValidationError)
    def invalid_field(request: Request, error: RequestValidationError) -> JSONResponse:
        found = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in found["loc"] if part != "body")
        if found["type"] == "json_invalid":
            return JSONResponse({"error": "the body is not valid JSON", "hint": str(found["ctx"]["error"])}, 400)
        given = "" if found["type"] == "missing" else f" (got {found['input']!r:.80})"
        return JSONResponse({"error": f"{where or 'body'}: {found['msg']}{given}", "hint": "see docs/http-api.md"}, 422)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        hint = f"the largest body is {MOST_BODY:,} bytes" if error.status_code == 413 else ""
        if error.status_code == 404:
            paths = [route.path for route in app.routes if hasattr(route, "path")]
            hint = nearest(request.url.path, paths) if request.url.path.startswith("/api") else "see docs/http-api.md"
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse({"error": detail, "hint": hint}, error.status_code, error.headers)


def main() -> int:
    """Runs the controller until SIGTERM."""
    import uvicorn

    home = Home.from_environment()
    options = UpOptions.read(home)
    lock = (home.up / "controller.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another controller is running for {home.root}", "moray status") from None
    cluster = LocalCluster(home, options.cluster)
    os.environ.update(cluster.environment())
    local = local_cluster(home, options.cluster)
    controller = Controller(home, Database(home.database), local, partial(find_cluster, home), _log)
    servers: list[uvicorn.Server] = []
    app = build_controller_app(
        home,
        controller,
        Overview(home, controller),
        ensure_token(home),
        lambda: any(server.should_exit for server in servers),
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app, host=HOST, port=options.port, log_level="warning", timeout_graceful_shutdown=2, access_log=False
        )
    )
    servers.append(server)
    loop = threading.Thread(target=controller.run, name="controller", daemon=True)
    loop.start()
    server.run()
    controller.stop()
    loop.join(10)
    return 0


def _log(text: str) -> None:
    import time

    with contextlib.suppress(OSError):  # a full disk
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MorayError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
