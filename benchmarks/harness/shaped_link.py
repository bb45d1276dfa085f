"""Two hosts in one machine: network namespaces joined by a rate-limited link. Requires Linux, root, `ip` and `tc`."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

ADDRESSES = ("10.231.78.1", "10.231.78.2")
INTERFACE = "eth0"


class ShapedLink:
    """Context manager for two hosts. Each reaches the other at its address, at the set rate in both directions."""

    def __init__(self) -> None:
        if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
            raise SystemExit("error: two hosts in one machine take root, `ip` and `tc` (package iproute2)")
        self._names = [f"mry{os.getpid()}l{host}" for host in (0, 1)]

    def __enter__(self) -> ShapedLink:
        for name in self._names:
            _run("ip", "netns", "add", name)
        one, other = self._names
        _run("ip", "link", "add", INTERFACE, "netns", one, "type", "veth", "peer", "name", INTERFACE, "netns", other)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            _run("ip", "netns", "del", name)

    def set_rate(self, mbit: float) -> None:
        """Sets the rate. The token bucket holds 5 ms of traffic at this rate, but at least one large packet."""
        bucket = max(int(mbit * 1e6 / 8 * 0.005), 70_000)
        for name in self._names:
            rate = ("rate", f"{int(mbit * 1000)}kbit", "burst", str(bucket), "latency", "2s")
            _run("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *rate)

    def start(self, host: int, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a process on a host, with pipes for stdin and stdout."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[host], *command],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **options,
        )


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
