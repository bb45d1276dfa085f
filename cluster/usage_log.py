"""Writes the cluster's total and used resources to `up/cluster.json` every two seconds: `python -m
moray.cluster.usage_log ADDRESS`.

This is a separate process, because Ray's client ends its process when the head is unreachable for a minute, and the
controller must survive that. The controller reads the file and ignores it when it is stale.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moray.cluster.pending import demand_words, is_dead, machines_in, waiting_in
from moray.platform.core.atomic import write_json
from moray.platform.core.cluster import BackendUnreachableError, Host, Usage
from moray.platform.core.home import Home

POLL_SECONDS = 2.0
_FRESH_SECONDS = 15.0


def usage_file(home: Home) -> Path:
    return home.up / "cluster.json"


def read_usage(home: Home) -> Usage:
    """Reads the last written usage. Raises BackendUnreachableError if it is stale: Ray has not responded since."""
    path = usage_file(home)
    try:
        age = time.time() - path.stat().st_mtime
        written = json.loads(path.read_text())
    except (OSError, ValueError):
        raise BackendUnreachableError("no usage data from the cluster yet") from None
    if age > _FRESH_SECONDS:
        raise BackendUnreachableError(f"Ray's head has not responded for {age:.0f} s")
    hosts = tuple(Host(**host) for host in written.pop("hosts", ()))
    return Usage(**written | {"waiting": tuple(written["waiting"]), "hosts": hosts})


def usage_in(state: Any) -> Usage:
    """Totals over the living nodes in Ray's ClusterResourceState, and the number of dead nodes."""
    machines = machines_in(state)

    def total(name: str) -> float:
        return sum(machine.total.get(name, 0.0) for machine in machines)

    def free(name: str) -> float:
        return sum(machine.free.get(name, 0.0) for machine in machines)

    return Usage(
        cpus=total("CPU"),
        cpus_used=total("CPU") - free("CPU"),
        gpus=total("GPU"),
        gpus_used=total("GPU") - free("GPU"),
        nodes=len(machines),
        dead_nodes=sum(map(is_dead, state.node_states)),
        waiting=tuple(f"{count} x {demand_words(demand.total())}" for demand, count in waiting_in(state).items()),
    )


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


def main(address: str) -> None:
    """Writes the usage log until the process is killed."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.exceptions import RaySystemError, RpcError

    raylet: Any = importlib.import_module("ray._raylet")  # compiled: nothing for a type checker to read
    client, path = raylet.GcsClient(address=address), usage_file(Home.from_environment())
    while True:
        try:
            write_json(path, asdict(usage_in(get_cluster_resource_state(client))))
        except (RpcError, RaySystemError) as error:
            _log(f"Ray's head does not respond: {error}")
        except OSError as error:  # a full disk: retry in the next iteration
            _log(f"cannot write {path}: {error}")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1])
