"""What the controller needs of a cluster: start an attempt, see what became of all of them, stop one.

Nothing here decides. `submit` and `stop` may be repeated at will: an attempt's id is what makes them one. `observe`
gives the complete set that the cluster knows, so that what is missing is known to be missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ExecutorState = Literal["pending", "running", "succeeded", "failed", "stopped"]


class BackendAwayError(Exception):
    """The cluster does not answer, so nothing is known; it may be back in a moment."""


@dataclass(frozen=True)
class Observed:
    """What the cluster says of an attempt. Its driver may be dead although the cluster calls it running."""

    state: ExecutorState
    detail: str = ""


@dataclass(frozen=True)
class Usage:
    """What the cluster has and what of it is held, over all nodes that run work."""

    cpus: float
    cpus_used: float
    gpus: float
    gpus_used: float
    nodes: int
    waiting: tuple[str, ...] = ()  # demands that have no room yet, in words


class ClusterBackend(ABC):
    """A cluster that runs attempts. Every method may raise BackendAwayError."""

    @abstractmethod
    def submit(self, attempt: str, environment: Mapping[str, str]) -> None:
        """Starts the driver of an attempt; nothing if it was started before."""

    @abstractmethod
    def observe(self) -> Mapping[str, Observed]:
        """Every attempt the cluster knows."""

    @abstractmethod
    def stop(self, attempt: str) -> None:
        """Asks the driver to end (SIGTERM, later SIGKILL); nothing if it is unknown or has ended."""

    @abstractmethod
    def forget(self, attempt: str) -> None:
        """Drops the cluster's record of an attempt that has ended, so that its list does not grow for ever."""

    @abstractmethod
    def usage(self) -> Usage:
        """What the cluster has."""
