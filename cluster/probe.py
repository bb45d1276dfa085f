"""Describes a cluster from inside, as JSON in the store: `python -m moray.cluster.probe NAME --store ADDRESS`.

Runs as a job. The driver describes its own host, and a task describes every other one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from moray.platform.core.errors import MorayError
from moray.platform.core.home import Home
from moray.platform.store.paths import AnyPath, check_store, store_root, write_file

PACKAGES = ("ray", "torch", "pyarrow", "numpy", "pydantic", "tokenizers", "numba", "boto3")
PROBES = ".probes"
STORE_PROBLEM = "cannot use the store"  # in the job's log, if the driver's host cannot write the result
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


def main(name: str, store: str) -> None:
    """Writes `<store>/.probes/NAME/result.json`: a list of `describe_host`, the driver's first."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    others = [node["NodeID"] for node in nodes if node["NodeID"] != here]
    remote: Any = ray.remote
    asked = [
        remote(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))(
            describe_host
        ).remote(name, store)
        for node in others
    ]
    own = describe_host(name, store)
    if own["store"]:  # the result cannot be written either: the job's log says why
        sys.exit(f"{own['host']} {STORE_PROBLEM}: {own['store']}")
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    done, late = ray.wait(asked, num_returns=len(asked), timeout=60) if asked else ([], [])
    hosts = {task: addresses[node] for task, node in zip(asked, others, strict=True)}
    found = [own, *(_result(task, hosts[task]) for task in done)]
    found += [{"host": hosts[task], "error": "a task on this node did not end within 60 s"} for task in late]
    write_file(result_path(store, name), json.dumps(found).encode())


def _result(reference: Any, host: str) -> dict[str, Any]:
    import ray

    try:
        found: dict[str, Any] = ray.get(reference)
        return found
    except ray.exceptions.RayError as error:
        return {"host": host, "error": " ".join(str(error).split())[:300]}


def describe_host(name: str, store: str) -> dict[str, Any]:
    """Versions, clock, GPUs, Ray's settings, and whether the store can be written and read, on this host."""
    import ray

    import moray

    context = ray.get_runtime_context()
    return {
        "host": ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
        "node": context.get_node_id(),
        "python": platform.python_version(),
        "moray": moray.__version__,  # type: ignore[attr-defined]
        "packages": {package: _version(package) for package in PACKAGES},
        "cpus": os.cpu_count(),
        "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        "home": _home(),
        "gcs_storage": _gcs_storage(),
        **_use_store(store, f"{PROBES}/{name}/{context.get_node_id()}"),
        "reconnect_seconds": os.environ.get(_RECONNECT, ""),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _home() -> str:
    """The problem with MORAY_HOME; "" if it can be used."""
    try:
        Home.from_environment()
    except MorayError as error:
        return error.message
    return ""


def _use_store(store: str, name: str) -> dict[str, Any]:
    """`store`: "" if the store can be written and read, else the problem. `skew`: this clock minus the store's."""
    path = store_root(store) / name
    try:
        check_store(store)  # fails within seconds
        write_file(path, b"probe")
        now = time.time()
        written = path.stat().st_mtime if isinstance(path, Path) else path.described().modified
        same = path.read_bytes() == b"probe"
    except (MorayError, OSError) as error:
        return {"store": str(error), "skew": 0.0}
    return {"store": "" if same else f"{path} has other contents than were written", "skew": now - written}


def _gcs_storage() -> str:
    """Where Ray's head keeps its state; "" on other hosts, and if its process cannot be inspected."""
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "gcs_server":
                settings = process.environ()
                return "redis" if settings.get("RAY_REDIS_ADDRESS") else settings.get("RAY_gcs_storage", "memory")
    return ""


def result_path(store: str, name: str) -> AnyPath:
    """The file with the result of a probe."""
    return store_root(store) / PROBES / name / "result.json"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3])
