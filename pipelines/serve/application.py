"""The Ray Serve application of one model: replicas, each of which contains both engine and HTTP application.

Notable: a separate ingress would add a process between proxy and engine. With a mock engine and eight clients, that
reduced the rate from 5,800 to 1,100 streamed chunks per second. What an ingress would do, `gateway.py` does in the
proxies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moray.pipelines.serve.scaling import TOKENS
from moray.platform.core.api_keys import ApiKey
from moray.platform.core.errors import InputError, MorayError
from moray.platform.core.serving import PREFIX, RESERVED_NAMES, UNIT, ServedModel, key_settings, told_error
from moray.platform.store.paths import any_path, local_folder

if TYPE_CHECKING:
    from fastapi import FastAPI

_HEALTH_SECONDS = 1.0  # until Serve notices that a replica has died
MOST_REQUESTS = 2048  # at once in a replica, whose engine refuses more answers than it can queue
_MOST_QUEUED = 1024  # in a proxy, while replicas are busy or start; more get status 503


class ModelReplica:
    """The replica's code: loads the model, then serves it until Ray stops the process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from moray.pipelines.serve.async_engine import AsyncEngine
        from moray.pipelines.serve.chat_prompt import Chat
        from moray.pipelines.serve.key_check import KeyCheck
        from moray.pipelines.serve.loading import load_engine
        from moray.pipelines.serve.report import ServingReport, replica_id

        self._model = ServedModel.model_validate(arguments)
        try:
            with local_folder(any_path(self._model.folder)) as local:
                engine = load_engine(local, self._model.options)
                self._chat = Chat.load(local, engine.vocabulary)
        except (MorayError, ValueError, FileNotFoundError) as error:  # of the user: Serve tells only the text
            raise InputError(told_error(error)) from error
        self._keys = KeyCheck(shared=True)
        self._engine = AsyncEngine(engine, self._model.options.threads)
        self._replica = replica_id()
        self._report = ServingReport(self._model, self._engine, self._replica)

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Ray Serve calls it before the first request, and when the keys have changed. settings: `key_settings`."""
        self._keys.required = True
        self._keys.update(settings["keys"])

    def check_health(self) -> None:
        """Ray Serve calls it, and replaces a replica for which it raises."""
        if self._engine.failed:
            raise RuntimeError("the engine has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scaling.py` decides by; Ray Serve calls it."""
        return {TOKENS: float(self._engine.tokens_in_flight)}

    def __serve_build_asgi_app__(self) -> FastAPI:
        from moray.pipelines.serve.openai_api import build_serving_app

        return build_serving_app(
            self._engine, self._model.name, self._model.version, self._report, self._chat, self._keys, self._replica
        )


def application_name(name: str) -> str:
    """The name of the Serve application of a deployment."""
    return f"{PREFIX}{name}"


def route_name(model: str) -> str:
    """The name for a model's route and id: a-z, 0-9, dots, dashes and underscores; none of the server's own paths."""
    name = re.sub(r"[^a-z0-9._-]+", "-", model.lower()).strip("-._") or "model"
    return f"{name}-model" if name in RESERVED_NAMES else name


def build_by_name(arguments: dict[str, Any]) -> Any:
    """Builds the Serve application from the fields of a `ServedModel`. Ray Serve calls it by its import path."""
    return build_application(ServedModel.model_validate(arguments))


def build_application(model: ServedModel, keys: Sequence[ApiKey] | None = None) -> Any:
    """The Serve application of a model. keys: that requests need; None for none. If only they differ, Serve keeps the
    replicas."""
    serve = import_serve()
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    replica = serve.deployment(
        serve.ingress()(ModelReplica),
        name=UNIT,
        num_replicas=model.options.replicas,
        ray_actor_options=dict(model.resources),
        max_ongoing_requests=MOST_REQUESTS,
        max_queued_requests=_MOST_QUEUED,
        graceful_shutdown_timeout_s=model.drain_seconds,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=model.starts,
        max_surge_percent=1,  # rounded up: a new version starts one replica, then stops an old one, and so on
        logging_config=quiet,
    )
    if keys is not None:
        # With a version, Serve compares what differs. It is the one that Serve makes of a declarative configuration.
        replica = replica.options(user_config=key_settings(keys), version=model.version or None, _internal=True)
    return replica.bind(model.model_dump())


def import_serve() -> Any:
    """`ray.serve`, without the stderr log handler that its import installs."""
    logger = logging.getLogger("ray.serve")
    handlers = list(logger.handlers)
    from ray import serve

    kept = [handler for handler in handlers if type(handler) is not logging.StreamHandler]
    logger.handlers[:] = kept or [logging.NullHandler()]
    return serve
