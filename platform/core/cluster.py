"""What Moray needs of a place where Ray runs: `Cluster` for a run, `ClusterBackend` for the controller's attempts.

Both are implemented in the `cluster` room. A backend decides nothing: `submit` and `stop` may be repeated at will,
because an attempt's id is what makes them one; `observe` gives the complete set that the cluster knows, so that what is
missing is known to be missing.
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
    """The machines a run may use, as far as a step's `placement` and defaults need to know them."""

    cpus: int
    gpus: int
    memory_bytes: int


class Cluster(ABC):
    """What the runner needs of a place where Ray runs. Implemented in the `cluster` room."""

    logs: Path | None = None  # where Ray's own logs are found after it has stopped
    fixed: ClassVar[bool] = False  # no machine will join, so what no machine can hold now it never can
    on_pending: Callable[[str], None] | None = None  # is told, in words, what Ray cannot place and why
    on_hopeless: Callable[[str], None] | None = None  # the same, of what a fixed cluster can never place

    @abstractmethod
    def ensure(self) -> Topology:
        """Starts Ray if it is not up, connects this process to it, and says what it has."""

    @abstractmethod
    def topology(self) -> Topology:
        """What the cluster has or would have, without starting anything."""

    @abstractmethod
    def stop(self) -> None:
        """Ends everything `ensure` started."""

    def say_pending(self, text: str, hopeless: bool = False) -> None:
        """What a watcher of the cluster calls: the runner shows a warning of the step at work, or ends it."""
        tell = self.on_hopeless if hopeless and self.fixed else self.on_pending
        if tell is not None:
            tell(text)

    @contextlib.contextmanager
    def exclusive(self, name: str, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Holds something that a cluster has only once, against other runs on it. A cluster of one run: nothing.

        Raises Cancelled if `cancelled()` becomes true while waiting.
        """
        yield


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
    """Resources of the cluster and their use, over all living nodes.

    nodes: living nodes. dead_nodes: nodes that died, which count for nothing else here.
    """

    cpus: float
    cpus_used: float
    gpus: float
    gpus_used: float
    nodes: int
    waiting: tuple[str, ...] = ()  # pending demands, in words
    dead_nodes: int = 0


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
