"""TCP ports to listen at.

A free port is looked for outside of the range from which the kernel gives ports to outgoing connections and to
listeners that name none: a Ray that starts in the meantime opens dozens of those, and one of them would be ours.
"""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from moray.platform.core.errors import InputError

_LOOPBACK = "127.0.0.1"
_FIRST = 20_000  # Ray gives its workers 10002 to 19999
_KERNELS_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ATTEMPTS = 100


def free_port(host: str = _LOOPBACK) -> int:
    """A TCP port of `host` that was free a moment ago, and that nobody will get by chance."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = _LOOPBACK) -> list[int]:
    """As many different ones."""
    ephemeral = _given_by_the_kernel()
    candidates = [port for port in range(_FIRST, 65_536) if port not in ephemeral]
    chance = random.SystemRandom()
    drawn = chance.sample(candidates, min(len(candidates), count + _ATTEMPTS))
    ports = [port for port in drawn if is_free(port, host)][:count]
    return ports if len(ports) == count else _any_ports(count, host)


def is_free(port: int, host: str = _LOOPBACK) -> bool:
    """Whether a server could listen there."""
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def check_port(host: str, port: int) -> None:
    """Raises InputError, with a free port in its hint, if nothing can listen at `host:port`."""
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken", f"try --port {free_port(host)}") from error
        if error.errno == errno.EACCES:
            raise InputError(f"port {port} of {host} needs more rights", f"try --port {free_port(host)}") from error
        raise InputError(
            f"cannot listen at {host}:{port}: {error.strerror}", "is --host an address of this machine?"
        ) from error


def _bind(host: str, port: int) -> None:
    with socket.socket() as probe:
        # As the server will: a port whose last connections are still being forgotten (TIME_WAIT) is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _given_by_the_kernel() -> range:
    """Linux's setting; elsewhere what the registry of ports calls dynamic."""
    try:
        first, last = map(int, _KERNELS_RANGE.read_text().split())
    except (OSError, ValueError):
        return range(49_152, 65_536)
    return range(first, last + 1)


def _any_ports(count: int, host: str) -> list[int]:
    """The kernel's own choice, for a machine that leaves no port out of its range."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
