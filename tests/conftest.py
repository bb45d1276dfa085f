"""What all tests share: one Ray cluster per test run, and settings that must be made before any import."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when kernels are decorated, so it must be set before anything imports triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

from moray.platform.home import Home
from moray.platform.step import Cluster, Topology

settings.register_profile("moray", deadline=None)  # a test never asserts a time
settings.load_profile("moray")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty MORAY_HOME."""
    root = tmp_path / "home"
    root.mkdir()
    return Home(root)


class SharedCluster(Cluster):
    """The test run's cluster: started once by the `ray_cluster` fixture, so a run neither starts nor stops it."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def ensure(self) -> Topology:
        return self._topology

    def topology(self) -> Topology:
        return self._topology

    def stop(self) -> None:
        logging.getLogger(__name__).debug("left running for the next test")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedCluster]:
    """A real embedded Ray with two CPUs."""
    from moray.cluster.embedded import EmbeddedCluster

    folder = tmp_path_factory.mktemp("ray")
    embedded = EmbeddedCluster(Home(folder), folder / "logs" / "ray.log", cpus=2)
    topology = embedded.ensure()
    yield SharedCluster(topology)
    embedded.stop()
