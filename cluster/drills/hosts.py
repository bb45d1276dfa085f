"""Hosts on one machine, for drills: each has its own network, process ids, /tmp, /dev/shm, home folder and disk.

A host is three Linux namespaces (network, pid, mount) on a bridge with shaped links. Its folders hide those of the
machine and of the other hosts; it sees the machine's Python packages as an image would contain them, but no checkout of
Moray unless asked. Only root may make hosts. A host loses its power when its first process is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from moray.cluster.drills import namespaces

NETWORK = "10.231.78"
GATEWAY = f"{NETWORK}.254"  # the machine's address, as the hosts see it
_HOME = "/mnt"  # the mount point of a host's own disk
_INIT = """
set -e
hostname "$NAME"
mount -t tmpfs -o size=3g tmpfs /dev/shm
mount --bind "$DISK/home" /mnt
if [ -n "$SHARED" ]; then
    mkdir -p /mnt/shared
    mount --bind "$SHARED" /mnt/shared
fi
# What the host sees of the machine, also if the machine has it below /tmp or below the checkout, which are hidden next.
mkdir -p /mnt/.image
mount --bind "$IMAGE" /mnt/.image
case "$HIDE/" in /|/tmp/*) ;; *) mount -t tmpfs -o size=1m tmpfs "$HIDE" ;; esac
mount --bind "$DISK/tmp" /tmp
mkdir -p "$IMAGE"
mount --bind /mnt/.image "$IMAGE"
exec sleep infinity
"""


def reason_against() -> str:
    """Why there can be no hosts on this machine; "" if there can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    for tool in ("ip", "nsenter", "unshare", "mount"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}`"
    try:
        with tempfile.TemporaryDirectory() as folder, DrillNetwork(Path(folder), Path(sys.prefix)) as network:
            network.add()
    except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
        return f"hosts cannot be made here: {' '.join(str(error).split())[:200]}"
    return ""


@dataclass
class DrillHost:
    """One host. number: its place on the network, from 1. hides: the checkout that it does not see, if any. shared: a
    folder that it sees at /mnt/shared, if any."""

    number: int
    disk: Path
    hides: Path | None
    shared: Path | None = None
    pid: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        return namespaces.name_of("d", self.number)

    @property
    def log(self) -> Path:
        """The output of its processes."""
        return self.disk / "output.log"

    @property
    def home(self) -> Path:
        """Its home folder, as the machine sees it."""
        return self.disk / "home"

    @property
    def is_on(self) -> bool:
        return self.pid != 0

    def pids(self) -> list[int]:
        """The processes on this host, as the machine numbers them. Empty if it is off."""
        return namespaces.pids(self.namespace)

    def command(self, command: Sequence[str], variables: Mapping[str, str], folder: str = _HOME) -> list[str]:
        """The command line that runs a command on this host."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
        given = {**kept, "HOME": _HOME, "MORAY_HOME": f"{_HOME}/moray", "TMPDIR": "/tmp", **variables}
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--pid", "--net", f"--wdns={folder}", "--"]
        return [*enter, "env", "-i", *(f"{name}={value}" for name, value in given.items()), *command]

    def start(self, command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a process that writes to `log`."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(command, variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process


class DrillNetwork:
    """A bridge with hosts. `checkout`: of Moray, with its Python environment. `rate`: of each link, as tc writes it,
    such as 1gbit; "" for unshaped links."""

    def __init__(self, folder: Path, checkout: Path, rate: str = "") -> None:
        self.hosts: list[DrillHost] = []
        self._folder, self._checkout, self._rate = folder, checkout, rate
        self._bridge = namespaces.name_of("b")

    def __enter__(self) -> DrillNetwork:
        namespaces.sweep()
        namespaces.add_bridge(self._bridge, f"{GATEWAY}/24")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            self.cut_power(host)
        namespaces.ip("link", "del", self._bridge)

    def add(self, hides: Path | None = None, shared: Path | None = None) -> DrillHost:
        """Makes a host with an empty disk, and powers it on."""
        number = len(self.hosts) + 1
        host = DrillHost(number, self._folder / f"host-{number}", hides, shared)
        for name in ("home", "tmp"):
            (host.disk / name).mkdir(parents=True)
        (host.disk / "tmp").chmod(0o1777)
        self.hosts.append(host)
        self.power_on(host)
        return host

    def power_on(self, host: DrillHost) -> None:
        """Boots a host. Its disk has what it had before; /dev/shm is empty."""
        name = host.namespace
        namespaces.add_host(name, self._bridge, host.address)
        if self._rate:
            self._shape(name)
        enter = [
            "ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
            "--mount-proc",
        ]  # fmt: skip
        folders = {
            "NAME": f"host-{host.number}",
            "DISK": str(host.disk),
            "HIDE": str(host.hides or ""),
            "SHARED": str(host.shared or ""),
            "IMAGE": sys.prefix if host.hides else str(self._checkout),
        }
        environment = {**os.environ, **folders}
        with host.log.open("ab") as log:
            unshare = subprocess.Popen(
                [*enter, "bash", "-c", _INIT], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        host.processes = [unshare]
        host.pid = _init_of(unshare, host)

    def cut_power(self, host: DrillHost) -> None:
        """First the network, so that nobody hears of it, then every process."""
        if not host.is_on:
            return
        namespaces.unplug(host.namespace)
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.pid, 9)
        for process in host.processes:
            process.wait()
        host.pid, host.processes = 0, []
        namespaces.ip("netns", "del", host.namespace)

    def _shape(self, name: str) -> None:
        shape = ["root", "tbf", "rate", self._rate, "burst", "256kb", "latency", "50ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", namespaces.link_of(name), *shape], check=True, capture_output=True)
        subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "eth0", *shape], check=True, capture_output=True)


def _init_of(unshare: subprocess.Popen[bytes], host: DrillHost) -> int:
    """The pid of a host's first process, once its folders are mounted."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and unshare.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(unshare.pid).children(recursive=True):
                if child.cmdline()[:1] == ["sleep"]:
                    return child.pid
        time.sleep(0.01)
    raise RuntimeError(f"host {host.number} did not start: {host.log.read_text(errors='replace')[-2000:]}")
