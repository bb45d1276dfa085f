"""Reports resource requests that a Ray cluster cannot place, and the missing resources. Ray itself waits silently.

Every two seconds the watcher reads the unplaced demand from the cluster's head (the data that Ray's autoscaler uses;
the request takes a millisecond). Requests that no machine could ever satisfy are reported at once, others after a
delay; each is reported once. Requests that wait for a placement group are skipped, because the demand contains the
group.
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
    """A pending request: the resources of each bundle. A task or actor has one bundle, a placement group several."""

    bundles: tuple[tuple[tuple[str, float], ...], ...]
    together: bool = False  # all bundles on one machine

    def total(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for bundle in self.bundles:
            for name, amount in bundle:
                sums[name] = sums.get(name, 0.0) + amount
        return sums


class PendingDemand(NamedTuple):
    """A report on a demand. unsatisfiable: the cluster's machines could never satisfy it."""

    text: str
    unsatisfiable: bool


@dataclass(frozen=True)
class Machine:
    """One node: its total and its free resources."""

    total: Mapping[str, float]
    free: Mapping[str, float]


class PendingReport:
    """Decides when to report a pending demand: the watcher's state, independent of Ray and the clock."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[Demand, tuple[float, int]] = {}  # when its count last fell, and the count
        self._reported: set[Demand] = set()

    def update(self, now: float, waiting: Mapping[Demand, int], machines: Sequence[Machine]) -> list[PendingDemand]:
        """Returns the reports that are due. waiting: demand -> count; now: seconds on any monotonic clock."""
        self._since = {demand: since for demand, since in self._since.items() if demand in waiting}
        found = []
        for demand, count in waiting.items():
            since, before = self._since.get(demand, (now, count))
            if count < before:
                since = now  # some of it was placed: restart the delay
            self._since[demand] = since, count
            lacking = _lacking(demand, machines)
            text = lacking or (_busy(demand, machines) if now - since >= self._patience else "")
            if text and machines and demand not in self._reported:
                self._reported.add(demand)
                found.append(PendingDemand(text, bool(lacking)))
        return found


class PendingWatcher:
    """Reports requests that the connected cluster cannot place to `note`, between `start` and `stop`.

    note: called from a thread, with the text and whether the demand is unsatisfiable. patience: seconds after which a
    satisfiable request that is still waiting is reported.
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
        """Stops the thread. No error if it was never started."""
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
                _log.warning("cannot read pending demand: %s", error)
                continue
            for finding in report.update(time.monotonic(), waiting_in(state), machines_in(state)):
                self._note(finding.text, finding.unsatisfiable)


def waiting_in(state: Any) -> dict[Demand, int]:
    """Extracts the pending demand from Ray's ClusterResourceState: demand -> count."""
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
    """The reason why the demand can never be placed on these machines; empty if it can."""
    alone = [demand.total()] if demand.together else [dict(bundle) for bundle in demand.bundles]
    for bundle in alone:
        if not any(_fits(bundle, machine.total) for machine in machines):
            largest = {name: max((m.total.get(name, 0.0) for m in machines), default=0.0) for name in bundle}
            return _never(
                bundle, largest, " on one machine, but the largest" if len(machines) > 1 else ", but the cluster"
            )
    everything = {name: sum(machine.total.get(name, 0.0) for machine in machines) for name in demand.total()}
    if not _fits(demand.total(), everything):
        return _never(demand.total(), everything, ", but the cluster")
    return ""


def _never(wanted: Mapping[str, float], available: Mapping[str, float], where: str) -> str:
    short = {name: amount for name, amount in wanted.items() if not _fits({name: amount}, available)}
    has = demand_words({name: available.get(name, 0.0) for name in short} or available)
    needs = demand_words(short or wanted)
    return f"cannot be scheduled: it needs {needs}{where} has {has}; request less or add machines"


def _busy(demand: Demand, machines: Sequence[Machine]) -> str:
    wanted = demand.total()
    parts = []
    for name in wanted:
        total = sum(machine.total.get(name, 0.0) for machine in machines)
        free = sum(machine.free.get(name, 0.0) for machine in machines)
        parts.append(f"{_amount(name, total - free)} of {demand_words({name: total})} in use")
    return f"waiting for {demand_words(wanted)}: {', '.join(parts)}"


def _fits(wanted: Mapping[str, float], available: Mapping[str, float]) -> bool:
    """Compares at Ray's resolution of 1/10,000, because sums of fractions have rounding errors."""
    return all(available.get(name, 0.0) + _HALF_UNIT >= amount for name, amount in wanted.items())


def demand_words(resources: Mapping[str, float]) -> str:
    """Formats resources: `64 CPU and 1 GPU`."""
    return " and ".join(f"{_amount(name, amount)} {name}" for name, amount in sorted(resources.items()))


def _amount(name: str, value: float) -> str:
    return size(value) if "memory" in name else f"{value:g}"
