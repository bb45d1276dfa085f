"""Hosts on one machine: network namespaces on a bridge, each with a Ray node in it. They can lose their power.

Only root may make them. Files are shared, as on a cluster with a network file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from moray.cluster.drills import namespaces
from moray.platform.core.ports import free_port

NETWORK = "10.231.77"
_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
_RAY = str(Path(sys.executable).with_name("ray"))


def reason_against() -> str:
    """Why there can be no hosts here, or ""."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "there is no `ip` (package iproute2)"
    probe = namespaces.name_of("p")
    if subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True).returncode:
        return "this machine lets nobody make network namespaces"
    namespaces.ip("netns", "del", probe)
    return ""


@dataclass
class Hosts:
    """Host 0 has Ray's head and no CPU; the others join it with one each, when they are started."""

    folder: Path
    port: int
    processes: dict[int, list[subprocess.Popen[bytes]]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{_address(0)}:{self.port}"

    def start(self, host: int) -> None:
        """Plugs a host in and starts its Ray node."""
        namespaces.add_host(_name(host), _bridge(), _address(host))
        command = [_RAY, "start", "--block", "--node-ip-address", _address(host), "--disable-usage-stats"]
        if host == 0:
            command += ["--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard", "false"]
            command += ["--temp-dir", str(self.folder)]
        else:
            command += ["--address", self.address, "--num-cpus", "1"]
        log = self.folder.parent / f"host-{host}.log"
        log.unlink(missing_ok=True)
        self.processes[host] = [self.run(host, command)]
        # One after another: nodes that share a folder choose the names of their sockets in it.
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert self.processes[host][0].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def run(self, host: int, command: list[str], **options: object) -> subprocess.Popen[bytes]:
        """A process on a host."""
        environment = {
            **os.environ, **_TOKEN, "GLOO_SOCKET_IFNAME": "eth0", "RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1",
            # A host that lost its power says nothing: this is how soon Ray holds it to be gone.
            "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        }  # fmt: skip
        log = (self.folder.parent / f"host-{host}.log").open("ab")
        with log:
            return subprocess.Popen(
                ["ip", "netns", "exec", _name(host), *command],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def pids(self, host: int) -> list[int]:
        return namespaces.pids(_name(host))

    def raylet(self, host: int) -> int:
        """The pid of a host's raylet."""
        return next(pid for pid in self.pids(host) if psutil.Process(pid).name() == "raylet")

    def workers(self, host: int) -> list[int]:
        """The pids of a host's training workers."""
        return [pid for pid in self.pids(host) if "RayTrainWorker" in " ".join(psutil.Process(pid).cmdline())]

    def cut_power(self, host: int) -> None:
        """First the network, so that nobody hears of it, then every process."""
        namespaces.unplug(_name(host))
        namespaces.kill_all(_name(host))
        for process in self.processes.pop(host, []):
            process.wait()
        namespaces.ip("netns", "del", _name(host))

    def wait_for(self, hosts: int, seconds: float = 60.0) -> None:
        """Until so many hosts with a CPU are there."""
        code = f"import ray; ray.init('{self.address}', log_to_driver=False); "
        code += "print(int(ray.cluster_resources().get('CPU', 0)))"
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            command = ["ip", "netns", "exec", _name(0), sys.executable, "-c", code]
            done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **_TOKEN})
            if done.stdout.strip().endswith(str(hosts)):
                return
        raise AssertionError(f"no cluster of {hosts} hosts: {done.stdout} {done.stderr[-2000:]}")


@contextlib.contextmanager
def hosts_of(folder: Path, count: int) -> Iterator[Hosts]:
    """A cluster of a head and `count` hosts with one CPU each. `folder` is for Ray; its path must be short."""
    namespaces.sweep()
    namespaces.add_bridge(_bridge())
    hosts = Hosts(folder, free_port())
    try:
        hosts.start(0)
        for host in range(1, count + 1):
            hosts.start(host)
        hosts.wait_for(count)
        yield hosts
    finally:
        for host in sorted(hosts.processes, reverse=True):
            hosts.cut_power(host)
        namespaces.ip("link", "del", _bridge())


def _name(host: int) -> str:
    return namespaces.name_of("h", host)


def _bridge() -> str:
    return namespaces.name_of("b")


def _address(host: int) -> str:
    return f"{NETWORK}.{host + 1}"
