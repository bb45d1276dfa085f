"""Finds free TCP ports to listen on.

Free ports are chosen outside the kernel's ephemeral range, which it uses for outgoing connections and for listeners on
port 0. A Ray cluster that starts in the meantime opens dozens of ephemeral ports and could take the chosen one.
"""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from moray.platform.core.errors import InputError

_LOOPBACK = "127.0.0.1"
_LAST_PORT = 65_535
_FIRST = 20_000  # Ray gives its workers 10002 to 19999
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ATTEMPTS = 100


def free_port(host: str = _LOOPBACK) -> int:
    """Returns a TCP port of `host` that was free a moment ago and that the kernel does not assign by itself."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = _LOOPBACK) -> list[int]:
    """Returns `count` distinct free ports."""
    ephemeral = _ephemeral_ports()
    candidates = [port for port in range(_FIRST, 65_536) if port not in ephemeral]
    drawn = random.SystemRandom().sample(candidates, min(len(candidates), count + _ATTEMPTS))
    ports = [port for port in drawn if is_free(port, host)][:count]
    return ports if len(ports) == count else _any_ports(count, host)


def is_free(port: int, host: str = _LOOPBACK) -> bool:
    """Whether a server could listen on the port."""
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def check_port(host: str, port: int) -> None:
    """Raises InputError, with a free port in its hint, if a server cannot listen on `host:port`."""
    if not host:
        raise InputError("--host is empty", "leave it out for 127.0.0.1, or use 0.0.0.0 for all addresses")
    if not 0 <= port <= _LAST_PORT:
        raise InputError(f"--port {port}", f"use a port from 0 (any free one) to {_LAST_PORT}")
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is in use", f"try --port {free_port(host)}") from error
        if error.errno == errno.EACCES:
            raise InputError(
                f"port {port} of {host} requires elevated privileges", f"try --port {free_port(host)}"
            ) from error
        raise InputError(
            f"cannot listen on {host}:{port}: {error.strerror}", "is --host an address of this machine?"
        ) from error


def _bind(host: str, port: int) -> None:
    with socket.socket() as probe:
        # The server sets this too: a port with connections in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _ephemeral_ports() -> range:
    """The kernel's range on Linux, otherwise the IANA dynamic range."""
    try:
        first, last = map(int, _EPHEMERAL_RANGE.read_text().split())
    except (OSError, ValueError):
        return range(49_152, 65_536)
    return range(first, last + 1)


def _any_ports(count: int, host: str) -> list[int]:
    """Ports chosen by the kernel, for a machine whose ephemeral range covers all ports."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
