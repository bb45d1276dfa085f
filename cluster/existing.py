"""Jobs on a Ray cluster that exists already, known by the address of its dashboard (`Profile`).

Drivers run off the head where another node exists, because a driver does not survive its node. Files and the state of
runs are in the store of the profile.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from moray.cluster.code_package import code_package
from moray.cluster.ray_jobs import RayJobs, driver_command
from moray.platform.control.profiles import Profile
from moray.platform.core.cluster import BackendUnreachableError, Host, Usage

WORKER_SETUP = "moray.cluster.machine.set_up_worker"
_NODE_LABEL = "ray.io/node-id"
# A host that loses its power closes no connection. Without these, the owner of a task waits for a lost host for seven
# minutes, although Ray's head knows that it is dead.
_LOST_HOSTS = {"RAY_grpc_client_keepalive_time_ms": "20000", "RAY_grpc_client_keepalive_timeout_ms": "20000"}


class ExistingJobs(RayJobs):
    """Client of the cluster of a profile."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile.address, trust_env=True)
        self._profile = profile

    def token(self) -> str:
        return self._profile.token.reveal() if self._profile.token else ""

    def job(self, attempt: str, environment: Mapping[str, str]) -> dict[str, Any]:
        python = shlex.split(self._profile.python)
        return {
            "entrypoint": driver_command(python, attempt, "--store", self._profile.store),
            "runtime_env": self.runtime_env(environment),
            **self._off_the_head(),
        }

    def runtime_env(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """The runtime environment of drivers and tasks. Uploads Moray's code if the cluster does not have it."""
        variables = {**_LOST_HOSTS, **environment, **self._profile.variables()}
        found: dict[str, Any] = {"env_vars": variables, "worker_process_setup_hook": WORKER_SETUP}
        if self._profile.code == "package":
            found["working_dir"] = self._send_code()
        return found

    def hosts(self) -> tuple[Host, ...]:
        """The nodes that the cluster knows, the head first. Raises BackendUnreachableError."""
        response = self.request("GET", "/api/v0/nodes?detail=true&limit=10000")
        try:
            rows = response.json()["data"]["result"]["result"]
            found = [_host(row) for row in rows]
        except (ValueError, LookupError, TypeError) as error:
            raise BackendUnreachableError("the response is not that of Ray's dashboard") from error
        return tuple(sorted(found, key=lambda host: (not host.head, not host.alive, host.address)))

    def usage(self) -> Usage:
        hosts = self.hosts()
        alive = [host for host in hosts if host.alive]
        return Usage(
            cpus=sum(host.cpus for host in alive),
            cpus_used=0.0,
            gpus=sum(host.gpus for host in alive),
            gpus_used=0.0,
            nodes=len(alive),
            dead_nodes=len(hosts) - len(alive),
            hosts=hosts,
            memory_bytes=sum(host.memory_bytes for host in alive),
        )

    def _off_the_head(self) -> dict[str, Any]:
        """The part of a request that places the driver: not on the head, unless it is the only node."""
        hosts = self.hosts()
        head = next((host for host in hosts if host.head), None)
        if head is None or not any(host.alive and not host.head for host in hosts):
            return {}
        return {"entrypoint_label_selector": {_NODE_LABEL: f"!{head.id}"}}

    def _send_code(self) -> str:
        package = code_package()
        path = f"/api/packages/gcs/{package.name}"
        if not self.request("GET", path).ok:  # also after the cluster was recreated
            response = self.request("PUT", path, data=package.data)
            if not response.ok:
                raise BackendUnreachableError(f"Ray rejected the code: HTTP {response.status_code}")
        return package.uri


def _host(row: Mapping[str, Any]) -> Host:
    resources = row.get("resources_total") or {}
    return Host(
        address=str(row["node_ip"]),
        alive=row["state"] == "ALIVE",
        head=bool(row["is_head_node"]),
        cpus=float(resources.get("CPU", 0.0)),
        gpus=float(resources.get("GPU", 0.0)),
        memory_bytes=float(resources.get("memory", 0.0)),
        id=str(row["node_id"]),
    )
