"""Network namespaces of this machine on a bridge, as hosts of their own. Only root may make them.

Names begin with `mry` and the process id of the drill, so that a later drill finds what a killed one left.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess

import psutil


def ip(*arguments: str) -> str:
    """Runs `ip` and returns its output. Raises CalledProcessError."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def name_of(letter: str, number: int | str = "") -> str:
    """The name of a bridge or of a host's namespace of this process. letter: a kind, which differs between users."""
    return f"mry{os.getpid()}{letter}{number}"


def add_bridge(name: str, address: str = "") -> None:
    """Adds a bridge. address: of this machine on it, as ADDRESS/BITS, if it has one."""
    ip("link", "add", name, "type", "bridge")
    if address:
        ip("addr", "add", address, "dev", name)
    ip("link", "set", name, "up")


def add_host(name: str, bridge: str, address: str) -> None:
    """Adds a namespace whose interface eth0 is on the bridge. Its other end here is `link_of(name)`."""
    ip("netns", "add", name)
    ip("link", "add", link_of(name), "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("link", "set", link_of(name), "master", bridge, "up")
    ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        ip("-n", name, "link", "set", device, "up")


def link_of(name: str) -> str:
    """The name of this machine's end of a host's link."""
    return f"{name}v"


def pids(name: str) -> list[int]:
    """The processes in a namespace, as this machine numbers them. Empty if there is no such namespace."""
    listed = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def unplug(name: str) -> None:
    """Removes the link of a host, so that nobody hears of what happens to it next."""
    with contextlib.suppress(subprocess.CalledProcessError):
        ip("link", "del", link_of(name))


def kill_all(name: str) -> None:
    """Kills every process in a namespace."""
    for pid in pids(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


def sweep() -> None:
    """Removes namespaces and links of drills that were killed."""
    for found in _left("netns", "list", pattern=r"(mry(\d+)[a-z]\d*)"):
        kill_all(found)
        ip("netns", "del", found)
    for found in _left("-o", "link", pattern=r"(mry(\d+)[a-z]\d*v?)[:@]"):
        # Not checked: a link disappears with the namespace of its other end.
        subprocess.run(["ip", "link", "del", found], check=False, capture_output=True)


def _left(*command: str, pattern: str) -> list[str]:
    """The names in the output of `ip` that the pattern finds, of processes that have ended."""
    return [name for name, pid in re.findall(pattern, ip(*command)) if not psutil.pid_exists(int(pid))]
