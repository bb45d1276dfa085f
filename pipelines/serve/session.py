"""Serves a model on the Ray cluster that this process is connected to, until it is stopped.

Used by `moray serve` and `smoke-serve`. Deployments that outlive their process are ordered through Ray's REST API
(`cluster/serve_api.py`), with the same application. A Serve instance has one address and any number of applications;
deploying the same model again changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moray.pipelines.serve.application import application_name, build_application, import_serve, route_name
from moray.pipelines.serve.gateway import VERSION
from moray.platform.core.api_keys import ApiKey
from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.ports import check_port, free_port, is_free
from moray.platform.core.serve_options import ServeOptions
from moray.platform.core.serving import UNIT, ServedModel, read_told
from moray.platform.store.paths import AnyPath

ANY_HOST = "0.0.0.0"  # every address of a machine
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}  # Ray's name of each actor option
_HEAD = "node:__internal_head__"  # a resource of Ray's head
START_SECONDS = 300.0  # for placing a replica on the cluster and loading the model
DRAIN_SECONDS = 20.0
_LOGS = "see Ray's logs, of an embedded cluster in $MORAY_HOME/logs"


@dataclass(frozen=True)
class ServingSession:
    """A model that is served at `url` with the id `name`."""

    url: str
    name: str
    model: ServedModel | None = field(default=None, compare=False, repr=False)
    notice: str = field(default="", compare=False)  # what whoever serves the model should know

    def accept_keys(self, keys: Sequence[ApiKey]) -> None:
        """Requests need one of these keys from now on. The replicas go on."""
        assert self.model is not None
        import_serve().run_many([_target(self.model, keys)], wait_for_applications_running=False)

    def stop(self) -> None:
        """Waits for running requests, up to DRAIN_SECONDS. Then shuts Serve down and frees the port, unless other
        models are served. Does nothing if Serve is already down."""
        serve = import_serve()
        # The application first, because `_shut_down` also stops the proxies, which closes all connections.
        if application_name(self.name) in serve.status().applications:
            serve.delete(application_name(self.name))
        if not serve.status().applications:
            _shut_down(serve, self.url)


def open_session(
    folder: AnyPath,
    name: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    options: ServeOptions | None = None,
    gpus: int = 0,
    keys: Sequence[ApiKey] | None = None,
) -> ServingSession:
    """Serves the model in `folder` as `name`, in lower case and without spaces.

    Returns once the model answers over HTTP. port: None takes that of a Serve instance that runs already, or else a
    free one. gpus: of the cluster, so that a replica gets one. keys: that requests need; None for none. Raises
    InputError for an unusable folder, address or option, StepFailed if the model does not start.
    """
    options = options or ServeOptions()
    if isinstance(folder, Path):
        folder = folder.resolve()
    _check_folder(folder)
    resources = options.resources(gpus)
    _check_resources(resources, options.replicas)
    serve = import_serve()
    status = serve.status()
    if status.proxies and port is None:
        host, port = _address()
    session = ServingSession(f"http://{_reachable(host)}:{port or free_port(host)}", route_name(name))
    if status.proxies:
        _check_address(session.url)
    model = ServedModel(
        folder=str(folder),
        name=session.name,
        version=_identity(folder, options),
        options=options,
        resources=resources,
        drain_seconds=DRAIN_SECONDS,
    )
    session = replace(session, model=model)
    if application_name(model.name) in status.applications and _version(session) == model.version:
        if keys is not None:
            session.accept_keys(keys)
        return session
    started = False
    try:
        _start(serve, model, host, urlsplit(session.url).port or 0, keys)
        started = True
        if port is None:  # another process may have started Serve at the same moment
            session = replace(session, url="http://{}:{}".format(*_reachable_address()))
        _wait_until_running(serve, model)
        _wait_until_healthy(f"{session.url}/{session.name}")
        session = replace(session, notice=_notice(f"{session.url}/{session.name}/health"))
    except BaseException as error:
        if application_name(model.name) not in status.applications:
            serve.delete(application_name(model.name))
        if not status.proxies and not serve.status().applications:  # this call started Serve
            # If it did not start for an InputError, another process has the port: do not wait for it to become free.
            _shut_down(serve, "" if isinstance(error, InputError) and not started else session.url)
        raise
    return session


def clear_sessions(prefix: str) -> None:
    """Removes the models that an earlier run left on the connected cluster, whose names begin with `prefix`. Shuts
    Serve down if it serves no others."""
    serve = import_serve()
    status = serve.status()
    if not status.proxies:
        return
    left = [name for name in status.applications if name.startswith(application_name(prefix))]
    for name in left:
        serve.delete(name)
    if len(left) == len(status.applications):
        _shut_down(serve, "")


def _check_folder(folder: AnyPath) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} contains no {name}", "use a folder that the `export` step wrote")


def _check_resources(resources: Mapping[str, float], replicas: int) -> None:
    """Raises InputError if the replicas cannot be placed, because Serve would wait indefinitely."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for option, wanted in resources.items():
        resource = _RESOURCES[option]
        has = [node.get(resource, 0.0) for node in nodes]
        if max(has) < wanted:
            raise InputError(
                f"a replica requires {wanted:g} {resource}, and the cluster's largest machine has {max(has):g}",
                f"ask for less, or give the cluster more {resource}",
            )
        if sum(has) < wanted * replicas:
            raise InputError(
                f"{replicas} replicas require {wanted * replicas:g} {resource}, and the cluster has {sum(has):g}",
                f"use fewer replicas, or give the cluster more {resource}",
            )


def _identity(folder: AnyPath, options: ServeOptions) -> str:
    """Identifies what is served, so that Serve keeps its replicas if the same is deployed again.

    A rewritten folder counts as another model. The modification time is that of its config, which is written last. A
    folder in the store never changes.
    """
    version = (folder / "config.json").stat().st_mtime_ns if isinstance(folder, Path) else ""
    return hashlib.sha256(f"{folder}\n{version}\n{options}".encode()).hexdigest()[:12]


def _start(serve: Any, model: ServedModel, host: str, port: int, keys: Sequence[ApiKey] | None) -> None:
    from ray.exceptions import RayTaskError
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    except RayTaskError:  # raised by the proxy, which listens on the port
        check_port(host, port)
        raise
    serve.run_many([_target(model, keys)], wait_for_applications_running=False)


def _target(model: ServedModel, keys: Sequence[ApiKey] | None) -> Any:
    application = build_application(model, keys)
    target = import_serve().RunTarget(application, name=application_name(model.name), route_prefix=f"/{model.name}")
    return target


def _wait_until_running(serve: Any, model: ServedModel) -> None:
    """Waits up to START_SECONDS; Serve itself would wait indefinitely, for instance for cluster capacity."""
    deadline = time.monotonic() + START_SECONDS
    while (application := serve.status().applications[application_name(model.name)]).status != "RUNNING":
        replicas = application.deployments.get(UNIT)
        report = replicas.message if replicas else application.message
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reason, hint, mendable = read_told(report)
            kind, fix = (InputError, "correct the model's files") if mendable else (StepFailed, _LOGS)
            raise kind(f"the model in {model.folder} does not start: {reason}", hint or fix)
        if time.monotonic() > deadline:
            raise StepFailed(
                f"the model in {model.folder} did not start within {START_SECONDS:.0f} s: {report}",
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

    try:
        controller = _controller()
    except ValueError:
        return  # already down
    deadline = time.monotonic() + DRAIN_SECONDS + 30
    try:
        ray.get(controller.graceful_shutdown.remote(wait=False))
        while time.monotonic() < deadline:
            _controller()
            time.sleep(0.05)
    except (ValueError, ray.exceptions.RayActorError):
        pass  # the actor no longer exists
    address = urlsplit(url)
    while _is_taken(address.hostname or "", address.port or 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    serve.shutdown()  # clears this process's handle


def _controller() -> Any:
    """Serve's controller actor. Raises ValueError if Serve does not run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def _address() -> tuple[str, int]:
    """Where the proxies of the running Serve instance listen."""
    import ray

    options = ray.get(_controller().get_http_config.remote())
    return str(options.host), int(options.port)


def _reachable_address() -> tuple[str, int]:
    host, port = _address()
    return _reachable(host), port


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
            raise StepFailed(f"{url}/health did not answer within {seconds:.0f} s", _LOGS)
        time.sleep(0.05)


def _notice(url: str) -> str:
    """What a replica has to tell in its health."""
    try:
        with _opener().open(url, timeout=5) as response:
            return str(json.load(response).get("notice", ""))
    except (OSError, http.client.HTTPException, ValueError):
        return ""


def _version(session: ServingSession) -> str | None:
    """The version that answers; None if none does."""
    return _get(f"{session.url}/{session.name}/health")[1].get(VERSION.decode())


def _status(url: str) -> int | None:
    """The HTTP status of `url`; None if there is no response."""
    return _get(url)[0]


def _get(url: str) -> tuple[int | None, Mapping[str, str]]:
    """Status and headers of the response; None without one."""
    try:
        with _opener().open(url, timeout=5) as response:
            return int(response.status), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)
    except (OSError, http.client.HTTPException):
        return None, {}


def _opener() -> urllib.request.OpenerDirector:
    """Without a proxy, because with http_proxy set even loopback requests would be sent to it."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _reachable(host: str) -> str:
    """The address for clients of a proxy that listens at `host` on the head; a wildcard address is no destination."""
    if host not in ("", ANY_HOST):
        return host
    import ray

    own = ray.get_runtime_context().get_node_id()
    heads = [node for node in ray.nodes() if _HEAD in node["Resources"] and node["NodeID"] != own]  # type: ignore[no-untyped-call]
    return str(heads[0]["NodeManagerAddress"]) if heads else "127.0.0.1"
