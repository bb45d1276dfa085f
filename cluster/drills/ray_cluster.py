"""A Ray cluster for drills: a head, nodes, an S3 server and a laptop, each on a host of its own."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from moray.cluster.drills.hosts import DrillHost, DrillNetwork

TOKEN = "0123456789abcdef" * 4
BUCKET = "drill"
WORK = "/mnt/work"  # the current folder of the laptop
KEYS = {"AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill-secret", "AWS_DEFAULT_REGION": "us-east-1"}
_RAY_PORT, _DASHBOARD_PORT, _S3_PORT = 6379, 8265, 9000
_START_SECONDS = 90.0
_PYTHON = sys.executable
_RAY = str(Path(_PYTHON).with_name("ray"))
_VARIABLES = {
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    # A host that lost its power says nothing: this is how soon Ray holds it to be gone.
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3", "GLOO_SOCKET_IFNAME": "eth0",
}  # fmt: skip


@dataclass
class RayDrill:
    """The hosts of a cluster. The laptop sees the checkout; the others get Moray's code with each job."""

    network: DrillNetwork
    checkout: Path
    store: DrillHost
    head: DrillHost
    laptop: DrillHost
    nodes: list[DrillHost] = field(default_factory=list)
    shared: Path | None = None  # a folder that all hosts see, as the store instead of the S3 server
    proxy: str = ""  # the URL of a proxy before the S3 server, which the laptop and the nodes use

    @property
    def work(self) -> Path:
        """The laptop's folder WORK, as the machine sees it."""
        return self.laptop.home / "work"

    @property
    def endpoint(self) -> str:
        """The URL of the S3 server."""
        return f"http://{self.store.address}:{_S3_PORT}"

    @property
    def root(self) -> str:
        """The address of the store."""
        return "/mnt/shared" if self.shared else f"s3://{BUCKET}/runs-and-artifacts"

    def start_store(self) -> None:
        """Starts the S3 server, whose log lists every request with its client."""
        self.store.start([_PYTHON, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(_S3_PORT)], {})
        _until(lambda: _answers(self.endpoint), "the S3 server does not answer", self.store)
        import boto3.session

        names = (KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"])
        session = boto3.session.Session(*names, region_name=KEYS["AWS_DEFAULT_REGION"])
        session.client("s3", endpoint_url=self.endpoint).create_bucket(Bucket=BUCKET)

    def start_head(self) -> None:
        """Starts Ray's head, with its state on its disk. It has no CPU."""
        command = [
            _RAY, "start", "--head", "--block", f"--node-ip-address={self.head.address}", f"--port={_RAY_PORT}",
            "--num-cpus=0", "--dashboard-host=0.0.0.0", f"--dashboard-port={_DASHBOARD_PORT}", "--disable-usage-stats",
            "--object-store-memory=80000000",
        ]  # fmt: skip
        durable = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/mnt/gcs"}
        self.head.start(command, {**_VARIABLES, **durable})
        url = f"http://{self.head.address}:{_DASHBOARD_PORT}/api/version"
        _until(lambda: _answers(url), "Ray's head does not answer", self.head)

    def start_node(self, host: DrillHost) -> None:
        """Starts a Ray node with one CPU."""
        command = [
            _RAY, "start", "--block", f"--address={self.head.address}:{_RAY_PORT}",
            f"--node-ip-address={host.address}", "--num-cpus=1", "--object-store-memory=100000000",
        ]  # fmt: skip
        before = host.log.stat().st_size
        host.start(command, _VARIABLES)

        def joined() -> bool:
            with host.log.open("rb") as log:
                log.seek(before)
                return b"Ray runtime started" in log.read()

        _until(joined, "the node does not join", host)

    def profile(self) -> str:
        """The profile of this cluster."""
        variables = "".join(f"  {name}: {value}\n" for name, value in self.variables().items())
        return (
            f"kind: existing\naddress: http://{self.head.address}:{_DASHBOARD_PORT}\nstore: {self.root}\n"
            f"token: ${{env:RAY_TOKEN}}\npython: {_PYTHON}\nenvironment:\n{variables}"
        )

    def variables(self) -> dict[str, str]:
        """What drivers and tasks need to reach the store."""
        return {
            **KEYS,
            "AWS_ENDPOINT_URL": self.proxy or self.endpoint,
            "OMP_NUM_THREADS": "1",
            "MORAY_HOME": "/mnt/moray",
        }

    def moray(self, *arguments: str) -> list[str]:
        """The command line that runs `moray` on the laptop, in a folder that the other hosts do not have."""
        variables = {"PYTHONPATH": str(self.checkout), "RAY_TOKEN": TOKEN, "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
        return self.laptop.command([_PYTHON, "-P", "-m", "moray", *arguments], variables, WORK)

    def reboot(self, host: DrillHost) -> None:
        """Powers a node on again and lets it join."""
        self.network.power_on(host)
        self.start_node(host)

    def start_nodes(self, hosts: Sequence[DrillHost]) -> None:
        """Starts Ray nodes at the same time."""
        with ThreadPoolExecutor(len(hosts)) as threads:
            list(threads.map(self.start_node, hosts))

    def write_profile(self) -> None:
        """Writes the cluster's profile, `drill`, on the laptop."""
        profiles = self.laptop.home / "moray" / "clusters"
        profiles.mkdir(parents=True, exist_ok=True)
        (profiles / "drill.yaml").write_text(self.profile())

    def forget_state(self) -> None:
        """Deletes the state of Ray's head, which must be off."""
        shutil.rmtree(self.head.home / "gcs")

    def controllers(self) -> list[int]:
        """The processes of the laptop's controller."""
        return [pid for pid in self.laptop.pids() if "moray.platform.server.app" in " ".join(_command(pid))]

    def runs_driver(self, host: DrillHost) -> bool:
        """Whether the driver of a job is on this host."""
        return any("moray.platform.control.driver" in " ".join(_command(pid)) for pid in host.pids())


@contextmanager
def ray_drill(
    folder: Path, nodes: int, checkout: Path, rate: str = "", with_shared_folder: bool = False
) -> Iterator[RayDrill]:
    """A running cluster with this many nodes. `folder` gets the hosts' disks; it is emptied first. rate: of each link,
    as tc writes it. with_shared_folder: the store is a folder that all hosts see."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with DrillNetwork(folder, checkout, rate) as network:
        shared = folder / "shared" if with_shared_folder else None
        if shared:
            shared.mkdir()
        store, head = network.add(checkout), network.add(checkout, shared)
        drill = RayDrill(network, checkout, store, head, network.add(shared=shared), shared=shared)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda start: start(), [drill.start_store, drill.start_head]))
        drill.nodes += [network.add(checkout, shared) for _ in range(nodes)]
        drill.start_nodes(drill.nodes)
        drill.work.mkdir()
        drill.write_profile()
        yield drill


def fetches(drill: RayDrill) -> dict[tuple[str, str], int]:
    """How often each host downloaded each object as a whole: (address, key) -> number of GET requests."""
    found: dict[tuple[str, str], int] = {}
    for line in drill.store.log.read_text(errors="replace").splitlines():
        address, _, rest = line.partition(" - - ")
        if '"GET /' in rest and " 200 " in rest:
            key = rest.partition('"GET /')[2].partition(" ")[0].partition("?")
            if not key[1]:
                found[address, key[0]] = found.get((address, key[0]), 0) + 1
    return found


def object_store_contains(pids: Sequence[int], texts: Sequence[bytes]) -> list[bytes]:
    """Which of these texts are in the memory of Ray's object store, also in objects that were freed. pids: processes
    of the host, the raylet among them."""
    found: set[bytes] = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                if os.readlink(link).startswith("/dev/shm/plasma"):
                    with link.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                        found |= {text for text in texts if memory.find(text) >= 0}
    return sorted(found)


def _command(pid: int) -> list[str]:
    """The command line of a process; empty if it has ended."""
    with suppress(psutil.Error):
        return psutil.Process(pid).cmdline()
    return []


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with suppress(OSError), urllib.request.urlopen(request, timeout=2) as response:
        return bool(response.status == 200)
    return False


def _until(condition: Callable[[], bool], problem: str, host: DrillHost) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{problem}: {host.log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)
