"""Actors that all replicas and proxies of a Ray cluster share, found by name.

Such an actor ends with the process that made it, so nothing is left when models are no longer served; the next process
that needs it makes another. It holds nothing that must survive.
"""

from __future__ import annotations

from typing import Any

_NAMESPACE = "moray"


def shared_actor(kind: type) -> Any:
    """The handle of the only actor of a class on this cluster, which is made if there is none.

    Raises ValueError if this process is not connected to a cluster.
    """
    ray = _connected()
    actor: Any = ray.remote(num_cpus=0)(kind)
    return actor.options(name=_name(kind), namespace=_NAMESPACE, get_if_exists=True).remote()


def find_shared_actor(kind: type) -> Any:
    """The handle of that actor. Raises ValueError if there is none."""
    return _connected().get_actor(_name(kind), namespace=_NAMESPACE)


def _connected() -> Any:
    """Ray, which would otherwise start a cluster in this process."""
    import ray

    if not ray.is_initialized():
        raise ValueError("this process is not connected to a Ray cluster")
    return ray


def _name(kind: type) -> str:
    return f"moray-{kind.__name__}"
