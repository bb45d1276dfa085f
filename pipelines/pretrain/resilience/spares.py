"""Hosts whose ranks hung twice are left out when training restarts, if there are enough others.

A GPU, or a link, that hangs once often hangs again, and each time all ranks lose their steps since the last checkpoint.
Ray Train asks this callback for the hosts of each worker group that it starts, first or after a failure. Without a
spare host training continues as before, on all of them. It also does if a start without the hosts led to nothing,
because something else uses the others: their resources are known, but not who will free them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

NODE_LABEL = "ray.io/node-id"  # Ray gives it to every node
_SECONDS = 10.0


class SpareHosts(ControllerCallback):
    """watch: the RankWatch actor, which counts the hangs of each host."""

    def __init__(self, watch: Any) -> None:
        self._watch = watch
        self._asked = -1  # teams that had started when hosts were left out

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """The label selector of the hosts to use; None for all."""
        import ray

        try:
            blamed, teams = ray.get(self._watch.blamed.remote(), timeout=_SECONDS)
        except ray.exceptions.RayError:  # the watch restarts, and has forgotten
            return None
        nodes = {node["NodeID"]: node["Resources"] for node in _nodes() if node["Alive"]}
        if not (left_out := [node for node in blamed if node in nodes]):
            return None
        named = f"{_hosts(left_out)}, whose ranks hung more than once"
        others = [resources for node, resources in nodes.items() if node not in left_out]
        if room_for(others, scaling_config._resources_per_worker_not_none) < num_workers:
            self._watch.note.remote(f"there is no spare for {named}")
            return None
        if teams == self._asked:
            self._watch.note.remote(f"training could not start without {named}; it starts with all hosts")
            return None
        self._asked = teams
        self._watch.note.remote(f"training starts without {named}")
        return {NODE_LABEL: f"!in({','.join(left_out)})"}


def room_for(hosts: Sequence[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """How many workers with these resources the hosts can hold."""
    needs = {name: amount for name, amount in worker.items() if amount > 0}
    return sum(min(int(host.get(name, 0) / amount + 1e-9) for name, amount in needs.items()) for host in hosts)


def _hosts(nodes: Sequence[str]) -> str:
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in _nodes()}
    return f"{'host' if len(nodes) == 1 else 'hosts'} {', '.join(names.get(node, node) for node in nodes)}"


def _nodes() -> list[dict[str, Any]]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes
