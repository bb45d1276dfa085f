"""Jobs on a Ray cluster that exists already, known by the address of its dashboard (`Profile`).

Drivers run off the head where another node exists, because a driver does not survive its node. Files and the state of
runs are in the store of the profile.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from moray.cluster.code_package import code_package
from moray.cluster.pending import demand_words
from moray.cluster.ray_jobs import RayJobs, driver_command, module_command
from moray.platform.control.profiles import Profile
from moray.platform.core.cluster import BackendRefusedError, BackendUnreachableError, Host, Usage
from moray.platform.core.errors import InputError

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

    def check(self) -> None:
        """Raises InputError if jobs cannot run there until a person changes something, and BackendUnreachableError if
        nothing responds."""
        try:
            found, own = self.version(), importlib.metadata.version("ray")
        except BackendRefusedError as error:
            raise InputError(
                f"{self._profile.address}: {error}",
                "correct `address` of the profile, or `token`, such as ${file:~/.ray/auth_token}",
            ) from error
        if found != own:
            fix = f"install ray=={own} on the cluster's hosts, or ray=={found} here"
            raise InputError(f"{self._profile.address}: Ray {found} on the cluster, {own} here", fix)

    def version(self) -> str:
        """The cluster's version of Ray."""
        response = self.request("GET", "/api/version")
        try:
            return str(response.json()["ray_version"])
        except (ValueError, LookupError, TypeError) as error:
            raise BackendRefusedError(f"another program answers there (HTTP {response.status_code})") from error

    def job(self, attempt: str, environment: Mapping[str, str]) -> dict[str, Any]:
        python = shlex.split(self._profile.python)
        return {
            "entrypoint": driver_command(python, attempt, "--store", self._profile.store),
            "runtime_env": self.runtime_env(environment),
            **self._off_the_head(),
        }

    def submit_command(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Runs a module of Moray with its arguments as a job."""
        python = shlex.split(self._profile.python)
        job = {"entrypoint": module_command(python, *command), "runtime_env": self.runtime_env(environment)}
        self.post_job(name, {**job, **self._off_the_head()})

    def runtime_env(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """The runtime environment of drivers and tasks. Uploads Moray's code if the cluster does not have it."""
        variables = {**_LOST_HOSTS, **environment, **self._profile.variables()}
        found: dict[str, Any] = {"env_vars": variables, "worker_process_setup_hook": WORKER_SETUP}
        if self._profile.code == "package":
            found["working_dir"] = self._send_code()
        return found

    def hosts(self) -> tuple[Host, ...]:
        """The nodes that the cluster knows, the head first, without their use. Raises BackendUnreachableError."""
        return self._hosts({})

    def usage(self) -> Usage:
        load = self._load()
        hosts = self._hosts(load.get("usageByNode") or {})
        alive = [host for host in hosts if host.alive]
        return Usage(
            cpus=sum(host.cpus for host in alive),
            cpus_used=sum(host.cpus_used for host in alive),
            gpus=sum(host.gpus for host in alive),
            gpus_used=sum(host.gpus_used for host in alive),
            nodes=len(alive),
            waiting=tuple(f"{count} x {demand_words(wanted)}" for wanted, count in load.get("resourceDemand") or ()),
            dead_nodes=len(hosts) - len(alive),
            hosts=hosts,
            memory_bytes=sum(host.memory_bytes for host in alive),
        )

    def _hosts(self, used: Mapping[str, Any]) -> tuple[Host, ...]:
        """used: by node id and resource, [used, total]."""
        rows = self._read("/api/v0/nodes?detail=true&limit=10000", "result", "result")
        if rows is None:
            raise BackendUnreachableError("the response is not that of Ray's dashboard")
        found = [_host(row, used.get(str(row["node_id"])) or {}) for row in rows]
        # Ray also lists what died: a host that came back is not dead.
        hosts = {host.address: host for host in sorted(found, key=lambda host: host.alive)}
        return tuple(sorted(hosts.values(), key=lambda host: (not host.head, not host.alive, host.address)))

    def _load(self) -> Mapping[str, Any]:
        """The reserved resources and the pending demands, which Ray's autoscaler reports. Empty without one."""
        return self._read("/api/cluster_status", "clusterStatus", "loadMetricsReport") or {}

    def _read(self, path: str, *keys: str) -> Any:
        """A part of the data of a response; None if it does not have it."""
        try:
            found = self.request("GET", path).json()["data"]
            for key in keys:
                found = found[key]
        except (ValueError, LookupError, TypeError):
            return None
        return found

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


def _host(row: Mapping[str, Any], used: Mapping[str, Any]) -> Host:
    resources = row.get("resources_total") or {}

    def reserved(name: str) -> float:
        return float((used.get(name) or (0.0,))[0])

    return Host(
        address=str(row["node_ip"]),
        alive=row["state"] == "ALIVE",
        head=bool(row["is_head_node"]),
        cpus=float(resources.get("CPU", 0.0)),
        cpus_used=reserved("CPU"),
        gpus=float(resources.get("GPU", 0.0)),
        gpus_used=reserved("GPU"),
        memory_bytes=float(resources.get("memory", 0.0)),
        id=str(row["node_id"]),
    )
