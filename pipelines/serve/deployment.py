"""A model on Ray Serve: one replica that is engine and HTTP application in one (one hop from the proxy).

Notable: with a separate ingress, every token would cross one more process: measured with a mock engine at eight
clients, 1,100 streamed chunks a second instead of 5,800. A Serve instance has one address and, here, one application;
deploying the same model again changes nothing, another one takes its place.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.ports import check_port, is_free

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "moray"
MOST_REQUESTS = 256  # at once in a replica; the engine queues what it does not run yet
START_SECONDS = 300.0  # for a replica to find room on the cluster and to load the model
DRAIN_SECONDS = 20.0


@dataclass(frozen=True)
class Deployment:
    """A model that answers at `url`."""

    url: str
    name: str

    def stop(self) -> None:
        """Lets requests under way finish (for up to DRAIN_SECONDS), then shuts Serve down and frees the port.

        No error where it is down already.
        """
        serve = _import_serve()
        # First the application alone: `_shut_down` takes the proxies too, and with them every open connection.
        if APPLICATION in serve.status().applications:
            serve.delete(APPLICATION)
        _shut_down(serve, self.url)


class ModelReplica:
    """What runs in the replica's process: loads the model, then serves it until Ray stops it."""

    def __init__(self, folder: str, name: str, threads: int) -> None:
        import torch

        from moray.models import checkpoint
        from moray.pipelines.serve.async_engine import AsyncEngine
        from moray.pipelines.serve.detokenizer import ServingVocabulary
        from moray.pipelines.serve.engine import Engine

        torch.set_num_threads(threads)
        model = checkpoint.load(folder, mtp=False)
        vocabulary = ServingVocabulary.load(Path(folder), model.config.bos_token_id, model.config.eos_token_id)
        self._name = name
        self._engine = AsyncEngine(Engine(model, vocabulary), threads)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from moray.pipelines.serve.openai_api import build_serving_app

        return build_serving_app(self._engine, self._name)


def deploy(folder: Path, name: str, host: str = "127.0.0.1", port: int = 8000, cpus: float = 0.5) -> Deployment:
    """Serves the model in `folder` as `name` on the Ray cluster that this process is connected to.

    Returns once requests are answered over HTTP. cpus: what the replica takes from the cluster's count; at most 1,
    so that any machine has room for it. Raises InputError for a folder or an address that cannot be used, StepFailed
    for a model that does not come up.
    """
    folder = folder.resolve()
    _check_folder(folder)
    _check_room(cpus)
    serve = _import_serve()
    deployment = Deployment(f"http://{_reachable(host)}:{port}", name)
    status = serve.status()
    if status.proxies:
        _check_address(deployment.url)
    unit = _unit(folder, name, cpus)
    application = status.applications.get(APPLICATION)
    if application is not None and application.status == "RUNNING" and unit in application.deployments:
        return deployment
    try:
        _start(serve, folder, name, unit, host, port, cpus)
        _wait_until_running(serve, folder, unit)
        _wait_until_healthy(deployment.url)
    except BaseException as error:
        if not status.proxies:  # Serve is here because of this call alone
            # An InputError says that the port is another's, which nobody should wait for.
            _shut_down(serve, "" if isinstance(error, InputError) else deployment.url)
        raise
    return deployment


def clear() -> None:
    """Ends a Serve that somebody left on the cluster this process is connected to; nothing if there is none."""
    serve = _import_serve()
    if serve.status().proxies:
        _shut_down(serve, "")


def _check_folder(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}", "give a folder that the `export` step wrote")


def _check_room(cpus: float) -> None:
    """Serve would wait for ever for a machine that is not there."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    largest = max(node["Resources"].get("CPU", 0.0) for node in nodes if node["Alive"])
    if largest < cpus:
        raise InputError(
            f"a replica needs {cpus:g} CPU, the cluster's largest machine has {largest:g}", "give the cluster more CPUs"
        )


def _unit(folder: Path, name: str, cpus: float) -> str:
    """A name for the replicas of this very model, by which Serve's status tells whether it is there already.

    A folder that was written again is another model: its config is the last file to be written.
    """
    identity = f"{folder}\n{(folder / 'config.json').stat().st_mtime_ns}\n{name}\n{cpus}"
    return f"model-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _import_serve() -> Any:
    """`ray.serve`, without the handler to stderr that its import installs: what it says goes where it went before."""
    logger = logging.getLogger("ray.serve")
    handlers = list(logger.handlers)
    from ray import serve

    kept = [handler for handler in handlers if type(handler) is not logging.StreamHandler]
    logger.handlers[:] = kept or [logging.NullHandler()]
    return serve


def _start(serve: Any, folder: Path, name: str, unit: str, host: str, port: int, cpus: float) -> None:
    from ray.exceptions import RayTaskError
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    except RayTaskError:  # of the proxy that listens
        check_port(host, port)
        raise
    replica = serve.deployment(
        serve.ingress()(ModelReplica),
        name=unit,
        num_replicas=1,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,  # a model that does not load once does not load twice
        logging_config=quiet,
    )
    # One thread per whole CPU that the replica holds, as Ray itself sets OMP_NUM_THREADS.
    application = replica.bind(str(folder), name, max(1, int(cpus)))
    target = serve.RunTarget(application, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def _wait_until_running(serve: Any, folder: Path, unit: str) -> None:
    """Serve itself would wait for ever, for room on the cluster, say."""
    deadline = time.monotonic() + START_SECONDS
    while (application := serve.status().applications[APPLICATION]).status != "RUNNING":
        replicas = application.deployments.get(unit)
        report = replicas.message if replicas else application.message
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise StepFailed(f"the model in {folder} does not come up: {_reason(report)}", "see Ray's logs")
        if time.monotonic() > deadline:
            raise StepFailed(
                f"the model in {folder} is not up after {START_SECONDS:.0f} s: {report}",
                "has the cluster CPUs to spare?",
            )
        time.sleep(0.05)


def _shut_down(serve: Any, url: str) -> None:
    """As `serve.shutdown()`, which would have Ray print a complaint; returns when the port is free again.

    That call waits in the controller for the controller's own end, and Ray reports on the driver's stdout that a call
    it would have retried was lost. So: ask without waiting there, and watch from here. The proxy's process outlives
    the controller by a moment.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return  # it is down
    deadline = time.monotonic() + DRAIN_SECONDS + 30
    try:
        ray.get(controller.graceful_shutdown.remote(wait=False))
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.05)
    except (ValueError, ray.exceptions.RayActorError):
        pass  # no such actor any more
    address = urlsplit(url)
    while not is_free(address.port or 0, address.hostname or "") and time.monotonic() < deadline:
        time.sleep(0.05)
    serve.shutdown()  # forgets the handle that this process keeps


def _check_address(url: str) -> None:
    """Serve is running already: its address cannot change, so it must be the one asked for."""
    if _status(f"{url}/-/healthz") is None:  # 503 is well: no application yet
        raise InputError(f"Ray Serve runs on this cluster already, but not at {url}", "stop it, or give its address")


def _wait_until_healthy(url: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while _status(f"{url}/health") != HTTPStatus.OK:
        if time.monotonic() > deadline:
            raise StepFailed(f"{url}/health did not answer within {seconds:.0f} s", "see Ray's logs")
        time.sleep(0.05)


def _status(url: str) -> int | None:
    """The status that `url` is answered with; None where nothing answers."""
    # No proxy: environments with http_proxy set would send loopback requests there.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def _reachable(host: str) -> str:
    """Where to reach what listens at `host`: the wildcard is no destination."""
    return "127.0.0.1" if host in ("", "0.0.0.0") else host


def _reason(report: str) -> str:
    """The replica's own error out of Serve's report, which holds its traceback."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and ":" in line]
    return (named or lines or ["no reason given"])[-1]
