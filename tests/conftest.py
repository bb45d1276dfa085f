"""What all tests share: one Ray cluster per test run, and settings that must be made before any import."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.checkout import ROOT

# Read when kernels are decorated, so it must be set before anything imports triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

from moray.cluster.numba_cache import numba_cache
from moray.platform.api import RECIPES
from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.events import Event
from moray.platform.core.home import Home
from moray.platform.run.step_run import RunResult
from moray.platform.store.artifacts import Artifact, ArtifactStore
from tests.control_plane import ControlPlane
from tests.examples import examples
from tests.ranks import RankPool
from tests.s3 import KEYS, empty_bucket, s3_server
from tests.small_run import run_small, write_text
from tests.step_contexts import manifest_of

os.environ["NUMBA_CACHE_DIR"] = str(numba_cache(ROOT / ".numba"))

# A shell that starts the suite in the background makes it ignore Ctrl-C, and with it every command that a test
# interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What a test needs beside a CPU, by the fixture that brings it: `make quicktest` leaves all of it out.
NEEDS = {"ray_cluster": "ray", "control_plane": "plane", "s3_url": "s3", "ranks": "ranks", "browser": "browser"}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks a test by what it needs."""
    for name in NEEDS.keys() & set(getattr(item, "fixturenames", ())):
        item.add_marker(NEEDS[name])


settings.register_profile("moray", deadline=None, max_examples=examples(100))  # a test never asserts a time
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
    embedded = EmbeddedCluster(Home(folder), cpus=2)
    topology = embedded.ensure()
    yield SharedCluster(topology)
    embedded.stop()


@dataclass(frozen=True)
class Flow:
    """A finished run and what is needed to run it again with changes."""

    home: Home
    folder: Path
    result: RunResult
    events: list[Event]
    cluster: Cluster

    def artifact(self, step: str) -> Artifact:
        return self.result.steps[step].artifact

    def run(self, *overrides: str) -> tuple[RunResult, list[Event]]:
        """Runs the recipe again in the same home."""
        return run_small(self.home, self.folder, self.cluster, overrides)


@pytest.fixture(scope="session")
def flow(ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    folder, home = tmp_path_factory.mktemp("text"), Home(tmp_path_factory.mktemp("home"))
    write_text(folder)
    result, events = run_small(home, folder, ray_cluster)
    return Flow(home, folder, result, events, ray_cluster)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Processes for jobs that need ranks."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane for the test run: what is killed in it comes back."""
    made = ControlPlane(tmp_path_factory.mktemp("plane"))
    made.up("--slots", "2")
    yield made
    made.down()
    assert made.processes() == [], "down left processes"


@pytest.fixture
def plane(control_plane: ControlPlane) -> ControlPlane:
    return control_plane


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The URL of a real S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, on an empty bucket; the environment leads Moray there too."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**KEYS, "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": s3_url}.items():
        monkeypatch.setenv(name, value)
    return empty_bucket(s3_url)


@pytest.fixture
def built_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for what `make bench-corpus` and the quickstart build; a recipe reads no more than names."""
    built = tmp_path / "benchmarks/corpus/.cache/documents"
    built.mkdir(parents=True)
    for source in yaml.safe_load((RECIPES / "corpus-demo.yaml").read_text())["steps"]["corpus"]["with"]["sources"]:
        empty = pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
        pq.write_table(empty, built / source["include"][0].replace("0*", "000").replace("*", "000"))
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / "new.txt").write_text("a document")
    monkeypatch.setenv("MORAY_HOME", str(tmp_path / "home"))
    store = ArtifactStore(Home(tmp_path / "home"))
    folder = store.prepare("export", "aa", keep_leftovers=False)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    store.aliases.set("quickstart", "newest", store.commit(manifest_of("export", "aa", "model")).reference)
    monkeypatch.chdir(tmp_path)
