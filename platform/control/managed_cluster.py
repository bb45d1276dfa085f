"""A cluster as the controller knows it, and how it finds one by name. Implemented in the `cluster` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moray.platform.control.attempt import AttemptFiles, LocalFiles, StoredFiles
from moray.platform.core.cluster import ClusterBackend, Topology
from moray.platform.core.home import Home
from moray.platform.core.serving import ServingBackend
from moray.platform.store.paths import any_path


@dataclass(frozen=True)
class ManagedCluster:
    """A cluster that runs jobs.

    slots: jobs at the same time. store: where its runs are, if its hosts do not see this machine's files. topology:
    its resources; raises BackendUnreachableError. version: differs if the profile or its references do. address: of
    Ray, for drivers. environment: of drivers. where: its address, for messages. serving: its
    Ray Serve, for deployments.
    """

    name: str
    backend: ClusterBackend
    slots: int
    topology: Callable[[], Topology]
    store: str = ""
    version: str = ""
    address: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    serving: ServingBackend | None = None

    def files(self, home: Home, attempt: str) -> AttemptFiles:
        """The files of an attempt on this cluster."""
        run = home.runs / attempt
        if not self.store:
            return LocalFiles(run)
        stored = any_path(f"{self.store}/runs/{attempt}")
        if not isinstance(stored, Path):
            return StoredFiles(stored, run)
        stored.mkdir(parents=True, exist_ok=True)
        # If the runs of this machine are in the store already, they need no link.
        if not run.is_symlink() and not run.exists():
            run.parent.mkdir(parents=True, exist_ok=True)
            run.symlink_to(stored)
        return LocalFiles(stored)
