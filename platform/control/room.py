"""Whether the replicas of a deployment fit on a cluster, and what keeps them waiting, in words."""

from __future__ import annotations

from collections.abc import Mapping

from moray.platform.control.deployments import Deployment
from moray.platform.core.cluster import Usage
from moray.platform.core.errors import InputError
from moray.platform.core.units import size

_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}


def check_fit(resources: Mapping[str, float], replicas: int, usage: Usage) -> None:
    """Raises InputError if the cluster could not hold the replicas even if nothing else ran on it.

    resources: that a replica reserves, as Ray's actor options.
    """
    for option, wanted in resources.items():
        largest, total = _largest(option, usage), _total(option, usage)
        if option == "memory" and not total:  # unknown
            continue
        if wanted > largest:
            raise InputError(
                f"a replica requires {_amount(option, wanted)}, and the cluster's largest machine has "
                f"{_amount(option, largest)}",
                "ask for less, or give the cluster a larger machine",
            )
        if wanted * replicas > total:
            raise InputError(
                f"{replicas} replicas require {_amount(option, wanted * replicas)}, and the cluster has "
                f"{_amount(option, total)}",
                "use fewer replicas, or add machines",
            )


def room_reason(resources: Mapping[str, float], usage: Usage) -> str:
    """Why a replica is not placed; "" if there is room for it."""
    cpus, gpus = resources.get("num_cpus", 0.0), resources.get("num_gpus", 0.0)
    hosts = [host for host in usage.hosts if host.alive]
    free = [(host.cpus - host.cpus_used, host.gpus - host.gpus_used) for host in hosts]
    free = free or [(usage.cpus - usage.cpus_used, usage.gpus - usage.gpus_used)]
    fits = any(cpus <= of_cpus and gpus <= of_gpus for of_cpus, of_gpus in free)
    if fits and "memory" not in resources:
        return ""
    needs = ", ".join(_amount(option, wanted) for option, wanted in resources.items())
    used = [f"{usage.cpus_used:g} of {usage.cpus:g} CPUs are reserved"]
    if resources.get("num_gpus"):
        used.append(f"{usage.gpus_used:g} of {usage.gpus:g} GPUs are reserved")
    if fits:  # Ray does not report reserved memory by host
        used.append("no host with free CPUs and GPUs has the memory")
    return f"no room for a replica, which needs {needs}: {', '.join(used)}"


def reservation(deployment: Deployment) -> str:
    """What the replicas of a deployment reserve: `2 replicas x 0.5 CPU`."""
    version = deployment.desired
    each = version.model.resources if version else {}
    many = f"{deployment.replicas} replica" + ("s" if deployment.replicas != 1 else "")
    return f"{many} x {', '.join(_amount(option, wanted) for option, wanted in each.items())}"


def _largest(option: str, usage: Usage) -> float:
    if not usage.hosts:
        return _total(option, usage)
    values = {"num_cpus": "cpus", "num_gpus": "gpus", "memory": "memory_bytes"}
    return max((getattr(host, values[option]) for host in usage.hosts if host.alive), default=0.0)


def _total(option: str, usage: Usage) -> float:
    return {"num_cpus": usage.cpus, "num_gpus": usage.gpus, "memory": usage.memory_bytes}[option]


def _amount(option: str, value: float) -> str:
    return f"{size(int(value))} of memory" if option == "memory" else f"{value:g} {_NAMES[option]}"
