"""Interfaces to Ray clusters: `Cluster` for a run, `ClusterBackend` for the controller's attempts.

Both are implemented in the `cluster` package. A backend makes no decisions. `submit` and `stop` are idempotent, keyed
by attempt id. `observe` returns every attempt that the cluster knows, so an attempt that is absent does not exist
there.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Topology:
    """Resources of the machines a run may use, for a step's `placement` and defaults."""

    cpus: int
    gpus: int
    memory_bytes: int


class Cluster(ABC):
    """A Ray cluster as the runner uses it. Implemented in the `cluster` package."""

    logs: Path | None = None  # where Ray's own logs are kept after it has stopped
    fixed: ClassVar[bool] = False  # no machine will join, so a request that fits no machine now never will
    shares_files: bool = True  # all tasks see the files of this process's host
    on_pending: Callable[[str], None] | None = None  # called with a message when Ray cannot place a request
    on_unsatisfiable: Callable[[str], None] | None = None  # the same for a request a fixed cluster can never place

    @abstractmethod
    def ensure(self) -> Topology:
        """Starts Ray if it is not running, connects this process to it, and returns its resources."""

    @abstractmethod
    def topology(self) -> Topology:
        """The resources the cluster has or would have. Starts nothing."""

    @abstractmethod
    def stop(self) -> None:
        """Stops everything `ensure` started."""

    def report_pending(self, text: str, unsatisfiable: bool = False) -> None:
        """Called by a watcher of the cluster. The runner shows a warning for the current step, or ends the step."""
        callback = self.on_unsatisfiable if unsatisfiable and self.fixed else self.on_pending
        if callback is not None:
            callback(text)

    @contextlib.contextmanager
    def exclusive(self, name: str, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Holds a resource that a cluster has only once, so that other runs on it wait. No-op on a cluster of one run.

        Raises Cancelled if `cancelled()` becomes true while waiting.
        """
        yield


ExecutorState = Literal["pending", "running", "succeeded", "failed", "stopped"]


class BackendUnreachableError(Exception):
    """The cluster does not respond, so its state is unknown. This may be temporary."""


class BackendRefusedError(BackendUnreachableError):
    """What responds refuses this client, or is not a cluster. A person has to change something."""


@dataclass(frozen=True)
class Observed:
    """The state of an attempt as the cluster reports it. A driver reported as running may be dead. host: the address
    of the driver's node, once it has started."""

    state: ExecutorState
    detail: str = ""
    host: str = ""


@dataclass(frozen=True)
class Host:
    """One node of a cluster: its resources, and those that tasks and actors have reserved."""

    address: str
    alive: bool
    head: bool = False
    cpus: float = 0.0
    cpus_used: float = 0.0
    gpus: float = 0.0
    gpus_used: float = 0.0
    memory_bytes: float = 0.0
    id: str = ""


@dataclass(frozen=True)
class Usage:
    """Resources of the cluster and their use, over all living nodes.

    nodes: living nodes. dead_nodes: nodes that died, which count for nothing else here. hosts: all nodes, if known.
    """

    cpus: float
    cpus_used: float
    gpus: float
    gpus_used: float
    nodes: int
    waiting: tuple[str, ...] = ()  # pending demands, in words
    dead_nodes: int = 0
    hosts: tuple[Host, ...] = ()
    memory_bytes: float = 0.0


class ClusterBackend(ABC):
    """A cluster that runs attempts. Every method may raise BackendUnreachableError."""

    @abstractmethod
    def submit(self, attempt: str, environment: Mapping[str, str]) -> None:
        """Starts the driver of an attempt; no-op if it was started before."""

    @abstractmethod
    def observe(self) -> Mapping[str, Observed]:
        """Returns every attempt the cluster knows."""

    @abstractmethod
    def stop(self, attempt: str) -> None:
        """Signals the driver to stop (SIGTERM, later SIGKILL); no-op if it is unknown or has ended."""

    @abstractmethod
    def forget(self, attempt: str) -> None:
        """Deletes the cluster's record of an attempt that has ended, so that its list does not grow indefinitely."""

    @abstractmethod
    def usage(self) -> Usage:
        """Returns the resource usage of the cluster."""
