"""Interface to the Ray Serve instance of a cluster, for the controller. Implemented in `cluster/serve_api.py`.

A backend makes no decisions. `apply` is idempotent and names everything that is to be served, so a round that is
repeated changes nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moray.platform.core.api_keys import ApiKey
from moray.platform.core.errors import InputError, MorayError
from moray.platform.core.serve_options import ServeOptions

PREFIX = "moray-"  # of the names of Moray's applications in Ray Serve
UNIT = "model"  # the only Serve deployment of an application
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
# Paths of the server.
RESERVED_NAMES = ("v1", "health", "ready", "metrics", "tokenize", "detokenize", "docs", "redoc", "static", "-")
_SMOKE = "smoke-"  # names of the models that smoke-serve serves


def checked_deployment_name(name: str) -> str:
    """`name`, if a deployment can have it. Raises InputError."""
    if not _NAME.fullmatch(name):
        hint = "use --name: a lower-case letter, then up to 62 lower-case letters, digits, - and _"
        raise InputError(f"invalid deployment name {name!r:.80}", hint)
    if name in RESERVED_NAMES:
        raise InputError(f"{name!r} cannot be the name of a deployment: it is a path of the server", "use --name")
    if name.startswith(_SMOKE):
        raise InputError(f"{name!r} cannot be the name of a deployment: runs use names with {_SMOKE!r}", "use --name")
    return name


class ServedModel(BaseModel):
    """The arguments of the application that serves a model, as JSON.

    folder: of the model, local or in a store. name: of the deployment, its route and the model's id. version: of the
    deployment. reference: of the model's artifact. events: the folder where replicas report; "" for none. resources:
    that a replica reserves, as Ray's actor options. drain_seconds: time for open requests when a replica stops. starts:
    failed starts of a replica after which the version counts as failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    name: str
    version: str = ""
    reference: str = ""
    events: str = ""
    options: ServeOptions = ServeOptions()
    resources: dict[str, float] = Field(default_factory=dict)
    drain_seconds: float = 20.0
    starts: int = 1


def key_settings(keys: Sequence[ApiKey]) -> dict[str, Any]:
    """The `user_config` of a model's replicas, which Serve passes to `ModelReplica.reconfigure`."""
    return {"keys": [key.model_dump(mode="json", exclude={"prefix", "created", "revoked"}) for key in keys]}


@dataclass(frozen=True)
class ServeOrder:
    """A deployment that Serve is to run: the arguments of its application, as JSON, and its number of replicas.

    target_tokens: tokens in flight for each replica, by which their number changes (`ServeOptions`). settings: that
    replicas get without being replaced (`key_settings`); None if requests need no keys.
    """

    name: str
    arguments: Mapping[str, Any]
    replicas: int
    most_replicas: int
    target_tokens: int = 0
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ReplicaSeen:
    """A replica as Serve reports it. host: its address; "" until it is placed."""

    id: str
    state: str
    host: str = ""


@dataclass(frozen=True)
class DeploymentSeen:
    """A deployment as Serve reports it.

    state: `starting` also while another version rolls out; `failed` if no replica of the ordered version starts.
    order: what Serve was told; None for what a run serves itself.
    """

    state: Literal["starting", "running", "degraded", "failed", "removing"]
    message: str = ""
    order: ServeOrder | None = None
    replicas: tuple[ReplicaSeen, ...] = ()


@dataclass(frozen=True)
class ServingSeen:
    """The Serve instance of a cluster.

    port: 0 if Serve does not run. proxies: hosts with a healthy proxy. others: applications that are not Moray's.
    """

    host: str = ""
    port: int = 0
    proxies: tuple[str, ...] = ()
    deployments: Mapping[str, DeploymentSeen] = field(default_factory=dict)
    others: int = 0


def reason_in(report: str) -> str:
    """One line of Serve's report on replicas: the error that a traceback in it ends with, or else its first line."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and ":" in line]
    found = errors[-1] if errors else (lines or ["no reason given"])[0]
    return re.sub(r"^moray\.[\w.]+: ", "", found)[:500]  # a user's mistake: its class says nothing


_HINT = "  hint: "


def told_error(error: Exception) -> str:
    """A user's error in one line, for `read_told`."""
    if isinstance(error, MorayError):
        return error.message + (f"{_HINT}{error.hint}" if error.hint else "")
    return str(error)


def read_told(report: str) -> tuple[str, str, bool]:
    """Reason and hint in Serve's report on replicas that did not start, and whether the user can mend it."""
    reason, _, hint = reason_in(report).partition(_HINT)
    return reason, hint, "moray.platform.core.errors.InputError" in report


class ServingBackend(ABC):
    """The Serve instance of one cluster. Every method may raise BackendUnreachableError."""

    host: str  # where proxies listen

    @abstractmethod
    def observe(self) -> ServingSeen:
        """What Serve runs."""

    @abstractmethod
    def apply(self, port: int, orders: Sequence[ServeOrder]) -> None:
        """Makes Serve run exactly these deployments, and starts it if it does not run. Leaves others alone."""

    @abstractmethod
    def shut_down(self) -> None:
        """Stops Serve with everything that it runs."""
