"""Deployment of a model on Ray Serve: each replica contains both engine and HTTP application.

Notable: a separate ingress would add a process between proxy and engine. With a mock engine and eight clients, that
reduced the rate from 5,800 to 1,100 streamed chunks per second. A Serve instance has one address and, here, one
application. Deploying the same model again changes nothing; deploying another one replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.ports import check_port, is_free
from moray.platform.core.serve_options import ServeOptions
from moray.platform.store.paths import AnyPath, any_path, local_folder

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "moray"
ANY_HOST = "0.0.0.0"  # every address of a machine
_HEAD = "node:__internal_head__"  # a resource of Ray's head
MOST_REQUESTS = 256  # at once in a replica; the engine queues requests that it does not run yet
START_SECONDS = 300.0  # for placing a replica on the cluster and loading the model
DRAIN_SECONDS = 20.0


@dataclass(frozen=True)
class Deployment:
    """A model that is served at `url`."""

    url: str
    name: str

    def stop(self) -> None:
        """Waits for running requests (up to DRAIN_SECONDS), then shuts Serve down and frees the port.

        Does nothing if Serve is already down.
        """
        serve = _import_serve()
        # The application first, because `_shut_down` also stops the proxies, which closes all connections.
        if APPLICATION in serve.status().applications:
            serve.delete(APPLICATION)
        _shut_down(serve, self.url)


class ModelReplica:
    """The replica's code: loads the model, then serves it until Ray stops the process."""

    def __init__(self, folder: str, name: str, options: ServeOptions) -> None:
        from moray.pipelines.serve.async_engine import AsyncEngine
        from moray.pipelines.serve.loading import load_engine

        with local_folder(any_path(folder)) as local:
            engine = load_engine(local, options)
        self._name = name
        self._engine = AsyncEngine(engine, options.threads)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from moray.pipelines.serve.openai_api import build_serving_app

        return build_serving_app(self._engine, self._name)


def deploy(
    folder: AnyPath,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: ServeOptions | None = None,
    gpus: int = 0,
) -> Deployment:
    """Serves the model in `folder` as `name` on the Ray cluster that this process is connected to.

    Returns once the model answers over HTTP. gpus: of the cluster, so that a replica gets one. Raises InputError for an
    unusable folder, address or option, StepFailed if the model does not start.
    """
    options = options or ServeOptions()
    if isinstance(folder, Path):
        folder = folder.resolve()
    _check_folder(folder)
    resources = _resources(options, gpus)
    _check_resources(resources, options.replicas)
    serve = _import_serve()
    deployment = Deployment(f"http://{_reachable(host)}:{port}", name)
    status = serve.status()
    if status.proxies:
        _check_address(deployment.url)
    unit = _unit(folder, name, options)
    application = status.applications.get(APPLICATION)
    if application is not None and application.status == "RUNNING" and unit in application.deployments:
        return deployment
    try:
        _start(serve, _Target(folder, name, unit, options, resources), host, port)
        _wait_until_running(serve, folder, unit)
        _wait_until_healthy(deployment.url)
    except BaseException as error:
        if not status.proxies:  # this call started Serve
            # After an InputError, another process has the port, so do not wait for it to become free.
            _shut_down(serve, "" if isinstance(error, InputError) else deployment.url)
        raise
    return deployment


def clear() -> None:
    """Shuts down a Serve instance that an earlier run left on the connected cluster, if there is one."""
    serve = _import_serve()
    if serve.status().proxies:
        _shut_down(serve, "")


def _check_folder(folder: AnyPath) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} contains no {name}", "use a folder that the `export` step wrote")


def _resources(options: ServeOptions, gpus: int) -> dict[str, float]:
    """What a replica reserves, in the words of Ray's actor options. Raises InputError for a GPU that does not exist."""
    if options.device == "cuda" and not gpus:
        raise InputError("--device cuda: the cluster has no GPU", "use --device cpu")
    on_gpu = gpus and options.device != "cpu"
    return {"num_cpus": options.reserved_cpus, **({"num_gpus": 1.0} if on_gpu else {})}


def _check_resources(resources: Mapping[str, float], replicas: int) -> None:
    """Raises InputError if the replicas cannot be placed, because Serve would wait indefinitely."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for option, wanted in resources.items():
        resource = option.removeprefix("num_").removesuffix("s").upper()
        has = [node.get(resource, 0.0) for node in nodes]
        if max(has) < wanted:
            raise InputError(
                f"a replica requires {wanted:g} {resource}, and the cluster's largest machine has {max(has):g}",
                f"give the cluster more {resource}s",
            )
        if sum(has) < wanted * replicas:
            raise InputError(
                f"{replicas} replicas require {wanted * replicas:g} {resource}, and the cluster has {sum(has):g}",
                f"use fewer replicas, or give the cluster more {resource}s",
            )


def _unit(folder: AnyPath, name: str, options: ServeOptions) -> str:
    """A deployment name that identifies the model, so that Serve's status shows whether it is already deployed.

    A rewritten folder counts as another model. The modification time is that of its config, which is written last. A
    folder in the store never changes.
    """
    version = (folder / "config.json").stat().st_mtime_ns if isinstance(folder, Path) else ""
    identity = f"{folder}\n{version}\n{name}\n{options}"
    return f"model-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _import_serve() -> Any:
    """`ray.serve`, without the stderr log handler that its import installs."""
    logger = logging.getLogger("ray.serve")
    handlers = list(logger.handlers)
    from ray import serve

    kept = [handler for handler in handlers if type(handler) is not logging.StreamHandler]
    logger.handlers[:] = kept or [logging.NullHandler()]
    return serve


@dataclass(frozen=True)
class _Target:
    """What Serve is to run. unit: the name of the Serve deployment. resources: that a replica reserves."""

    folder: AnyPath
    name: str
    unit: str
    options: ServeOptions
    resources: Mapping[str, float]


def _start(serve: Any, target: _Target, host: str, port: int) -> None:
    from ray.exceptions import RayTaskError
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    except RayTaskError:  # raised by the proxy, which listens on the port
        check_port(host, port)
        raise
    replica = serve.deployment(
        serve.ingress()(ModelReplica),
        name=target.unit,
        num_replicas=target.options.replicas,
        ray_actor_options=dict(target.resources),
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,  # loading a model would fail again
        logging_config=quiet,
    )
    application = replica.bind(str(target.folder), target.name, target.options)
    wanted = serve.RunTarget(application, name=APPLICATION, route_prefix="/")
    serve.run_many([wanted], wait_for_applications_running=False)


def _wait_until_running(serve: Any, folder: AnyPath, unit: str) -> None:
    """Waits up to START_SECONDS; Serve itself would wait indefinitely, for instance for cluster capacity."""
    deadline = time.monotonic() + START_SECONDS
    while (application := serve.status().applications[APPLICATION]).status != "RUNNING":
        replicas = application.deployments.get(unit)
        report = replicas.message if replicas else application.message
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise StepFailed(f"the model in {folder} failed to start: {_reason(report)}", "see Ray's logs")
        if time.monotonic() > deadline:
            raise StepFailed(
                f"the model in {folder} did not start within {START_SECONDS:.0f} s: {report}",
                "check that the cluster has free CPUs",
            )
        time.sleep(0.05)


def _shut_down(serve: Any, url: str) -> None:
    """Shuts Serve down like `serve.shutdown()`, but without an error message from Ray. Returns when the port is free.

    `serve.shutdown()` waits inside the controller for the controller's own end, and Ray then prints on the driver's
    stdout that a retriable call was lost. So this function requests the shutdown without waiting for the call, and
    polls. The proxy's process ends shortly after the controller.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return  # already down
    deadline = time.monotonic() + DRAIN_SECONDS + 30
    try:
        ray.get(controller.graceful_shutdown.remote(wait=False))
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.05)
    except (ValueError, ray.exceptions.RayActorError):
        pass  # the actor no longer exists
    address = urlsplit(url)
    while _is_taken(address.hostname or "", address.port or 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    serve.shutdown()  # clears this process's handle


def _is_taken(host: str, port: int) -> bool:
    """Whether something listens at an address, of this machine or of another host."""
    if host in ("127.0.0.1", "localhost", "::1", ""):
        return not is_free(port, host)
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def _check_address(url: str) -> None:
    """Raises InputError if the running Serve has another address than `url`, because it cannot be changed."""
    if _status(f"{url}/-/healthz") is None:  # 503 is a valid response: no application yet
        raise InputError(
            f"Ray Serve already runs on this cluster, but not at {url}", "stop it, or deploy at its address"
        )


def _wait_until_healthy(url: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while _status(f"{url}/health") != HTTPStatus.OK:
        if time.monotonic() > deadline:
            raise StepFailed(f"{url}/health did not answer within {seconds:.0f} s", "see Ray's logs")
        time.sleep(0.05)


def _status(url: str) -> int | None:
    """The HTTP status of `url`; None if there is no response."""
    # No proxy, because with http_proxy set even loopback requests would be sent to it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def _reachable(host: str) -> str:
    """The address for clients of a proxy that listens at `host` on the head; a wildcard address is no destination."""
    if host not in ("", ANY_HOST):
        return host
    import ray

    own = ray.get_runtime_context().get_node_id()
    heads = [node for node in ray.nodes() if _HEAD in node["Resources"] and node["NodeID"] != own]  # type: ignore[no-untyped-call]
    return str(heads[0]["NodeManagerAddress"]) if heads else "127.0.0.1"


def _reason(report: str) -> str:
    """The replica's error from Serve's report, which contains its traceback."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and ":" in line]
    return (named or lines or ["no reason given"])[-1]
