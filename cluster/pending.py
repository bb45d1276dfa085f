"""Says what a Ray cluster cannot place, and what it lacks for it; Ray itself waits for ever without a word.

Every few seconds the cluster's head is asked for the demand it could not place (what the autoscaler is asked with; a
request of a millisecond). What no machine could ever hold is said at once, what finds no room for a while then, each
once. What waits for a placement group is left out: the group itself is in the demand.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moray.platform.core.units import size

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 15.0
_HALF_UNIT = 0.00005

_log = logging.getLogger("ray")


@dataclass(frozen=True)
class Demand:
    """What waits: resources of each bundle; a task or actor is one bundle, a placement group all of its own."""

    bundles: tuple[tuple[tuple[str, float], ...], ...]
    together: bool = False  # all bundles on one machine

    def total(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for bundle in self.bundles:
            for name, amount in bundle:
                sums[name] = sums.get(name, 0.0) + amount
        return sums


class PendingDemand(NamedTuple):
    """What there is to say of a demand. hopeless: no machine here could ever hold it."""

    text: str
    hopeless: bool


@dataclass(frozen=True)
class Machine:
    """One node: its resources, and what of them is free."""

    total: Mapping[str, float]
    free: Mapping[str, float]


class PendingReport:
    """From what waits to what there is to say: the watcher's memory, without Ray or a clock."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[Demand, tuple[float, int]] = {}  # when its count last fell, and the count
        self._said: set[Demand] = set()

    def update(self, now: float, waiting: Mapping[Demand, int], machines: Sequence[Machine]) -> list[PendingDemand]:
        """The findings that are due. waiting: demand -> how many; now: seconds, from any start."""
        self._since = {demand: since for demand, since in self._since.items() if demand in waiting}
        found = []
        for demand, count in waiting.items():
            since, before = self._since.get(demand, (now, count))
            if count < before:
                since = now  # some of it was placed: it moves
            self._since[demand] = since, count
            lacking = _lacking(demand, machines)
            text = lacking or (_busy(demand, machines) if now - since >= self._patience else "")
            if text and machines and demand not in self._said:
                self._said.add(demand)
                found.append(PendingDemand(text, bool(lacking)))
        return found


class PendingWatcher:
    """Tells `note` what the cluster that this process is connected to cannot place, between `start` and `stop`.

    note: is called from a thread, with the text and whether the demand is hopeless. patience: seconds after which
    waiting for room is worth a word.
    """

    def __init__(self, note: Callable[[str, bool], None], patience: float = PATIENCE_SECONDS) -> None:
        self._note = note
        self._patience = patience
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        import ray

        self._stop.clear()
        raylet: Any = importlib.import_module("ray._raylet")  # compiled: nothing for a type checker to read
        client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        self._thread = threading.Thread(target=self._watch, args=[client], name="pending demand", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No error if it was never started."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, client: Any) -> None:
        from ray.autoscaler.v2.sdk import get_cluster_resource_state
        from ray.exceptions import RaySystemError, RpcError

        report = PendingReport(self._patience)
        while not self._stop.wait(POLL_SECONDS):
            try:
                state = get_cluster_resource_state(client)
            except (RpcError, RaySystemError) as error:
                _log.warning("pending demand is not known: %s", error)
                continue
            for finding in report.update(time.monotonic(), waiting_in(state), machines_in(state)):
                self._note(finding.text, finding.hopeless)


def waiting_in(state: Any) -> dict[Demand, int]:
    """The demand in Ray's ClusterResourceState, with how often each is wanted."""
    found: dict[Demand, int] = {}
    for pending in state.pending_resource_requests:
        demand = Demand((_bundle(pending.request),))
        if not any("_group_" in name for name, _ in demand.bundles[0]):
            found[demand] = found.get(demand, 0) + pending.count
    for gang in state.pending_gang_resource_requests:
        demand = Demand(tuple(sorted(_bundle(request) for request in gang.requests)), ":STRICT_PACK|" in gang.details)
        found[demand] = found.get(demand, 0) + 1
    return found


def machines_in(state: Any) -> list[Machine]:
    """The nodes in Ray's ClusterResourceState that are alive. Ray also lists dead nodes there, without resources."""
    alive = [node for node in state.node_states if not is_dead(node)]
    return [Machine(dict(node.total_resources), dict(node.available_resources)) for node in alive]


def is_dead(node: Any) -> bool:
    """Whether a node of Ray's ClusterResourceState has died."""
    protocol: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")  # generated, without types
    return bool(node.status == protocol.NodeStatus.DEAD)


def _bundle(request: Any) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(request.resources_bundle.items()))


def _lacking(demand: Demand, machines: Sequence[Machine]) -> str:
    """Why the demand can never be placed here; empty if it can."""
    alone = [demand.total()] if demand.together else [dict(bundle) for bundle in demand.bundles]
    for bundle in alone:
        if not any(_fits(bundle, machine.total) for machine in machines):
            largest = {name: max((m.total.get(name, 0.0) for m in machines), default=0.0) for name in bundle}
            return _never(bundle, largest, "on one machine, the largest" if len(machines) > 1 else "the cluster")
    everything = {name: sum(machine.total.get(name, 0.0) for machine in machines) for name in demand.total()}
    if not _fits(demand.total(), everything):
        return _never(demand.total(), everything, "the cluster")
    return ""


def _never(wanted: Mapping[str, float], there: Mapping[str, float], where: str) -> str:
    short = {name: amount for name, amount in wanted.items() if not _fits({name: amount}, there)}
    has = demand_words({name: there.get(name, 0.0) for name in short} or there)
    needs = demand_words(short or wanted)
    return f"this can never start: it needs {needs}, {where} has {has}; ask for less or add machines"


def _busy(demand: Demand, machines: Sequence[Machine]) -> str:
    wanted = demand.total()
    parts = []
    for name in wanted:
        total = sum(machine.total.get(name, 0.0) for machine in machines)
        free = sum(machine.free.get(name, 0.0) for machine in machines)
        parts.append(f"{_amount(name, total - free)} of {demand_words({name: total})} in use")
    return f"waiting for {demand_words(wanted)}: {', '.join(parts)}"


def _fits(wanted: Mapping[str, float], room: Mapping[str, float]) -> bool:
    """In Ray's own resolution of a ten-thousandth: sums of fractions are off in their last digits."""
    return all(room.get(name, 0.0) + _HALF_UNIT >= amount for name, amount in wanted.items())


def demand_words(resources: Mapping[str, float]) -> str:
    """64 CPU and 1 GPU."""
    return " and ".join(f"{_amount(name, amount)} {name}" for name, amount in sorted(resources.items()))


def _amount(name: str, value: float) -> str:
    return size(value) if "memory" in name else f"{value:g}"
