"""The rounds of a cluster's deployments: observe Serve, decide by pure functions, record the decisions, act on them.

Every round starts from the database and from Serve's report, so a deployment is served again after anything that ends
it: a replica, a proxy, Serve's controller, Ray's head, a cluster that was recreated empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moray.platform.control.deployment_rules import Answers, DeploymentAction, DeploymentSight, decide_deployment
from moray.platform.control.deployments import Deployment, Deployments, Version
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.room import room_reason
from moray.platform.control.served_models import FoundModel, ServedModels
from moray.platform.control.serving_reports import ServingReports
from moray.platform.core.api_keys import served_keys
from moray.platform.core.cluster import BackendUnreachableError
from moray.platform.core.errors import MorayError
from moray.platform.core.home import Home
from moray.platform.core.ports import is_free
from moray.platform.core.serving import DeploymentSeen, ServeOrder, ServingBackend, ServingSeen, key_settings

_ALIAS_SECONDS = 10.0  # between readings of aliases in a remote store
_MARK_SECONDS = 60.0  # between checks of the alias NAME@deployed
_ROOM_SECONDS = 5.0  # that a replica may wait for its place before the reason is looked up
_SHORTEST_RETRY, _LONGEST_RETRY = 30.0, 600.0  # between starts of a live version that fails to start
_MOST_DOUBLINGS = 10  # of that time


@dataclass
class _Memory:
    """What is known about a deployment between rounds, rebuilt after a restart. Times are monotonic seconds.

    target: of `alias`. placed_since: when all replicas of the desired version, `version`, had their places.
    """

    alias: str = ""
    target: str = ""
    target_due: float = 0.0
    unplaced_since: float | None = None
    version: int = 0
    placed_since: float | None = None
    failures: int = 0
    retry_at: float = 0.0
    marked: str = ""
    mark_due: float = 0.0


class DeploymentRounds:
    """Carries out the deployments of one cluster. `log` receives one line of text per event.

    reports: what the replicas report. seen: Serve's latest report; None while the cluster does not respond. error: why
    it does not.
    """

    def __init__(
        self,
        home: Home,
        deployments: Deployments,
        cluster: ManagedCluster,
        log: Callable[[str], None],
    ) -> None:
        self.cluster = cluster
        self.seen: ServingSeen | None = None
        self.error = ""
        self.reports = ServingReports(home, cluster.store)
        self._home, self._deployments, self._log = home, deployments, log
        self._memory: dict[str, _Memory] = {}
        self._models = ServedModels(home, cluster)
        self._settings: Mapping[str, object] | None = None  # of all replicas

    def set_cluster(self, cluster: ManagedCluster) -> None:
        """Uses another address or other credentials from now on."""
        if cluster is not self.cluster:
            self.cluster, self._models = cluster, ServedModels(self._home, cluster)
            self.reports = ServingReports(self._home, cluster.store)

    @property
    def _serve(self) -> ServingBackend:
        if self.cluster.serving is None:
            raise BackendUnreachableError("this cluster cannot serve models")
        return self.cluster.serving

    def gone(self, version: Version) -> str:
        """Why the model of a version cannot be read; "" if it can."""
        return self._models.gone(version.model.folder)

    def round(self) -> None:
        """Runs one round. An error in one deployment does not hold up the others."""
        mine = self._deployments.all(self.cluster.name, only_open=True)
        if not mine:
            self.seen, self.error = None, ""
            return
        try:
            self.seen = self._serve.observe()
            self.error = ""
            self._carry_out(mine, self.seen)
        except BackendUnreachableError as error:
            self.seen, self.error = None, str(error)
            for one in mine:
                self._deployments.explain(one.name, f"the cluster does not respond: {error}")

    def _carry_out(self, mine: Sequence[Deployment], seen: ServingSeen) -> None:
        running = [one for one in mine if one.wanted == "running"]
        port = running[0].port if running else 0
        self._settings = self._key_settings()
        blocked = self._blocked(port, seen) if port else ""
        orders = [order for one in running if (order := self._guarded(one, seen, blocked))]
        told = [one.order for one in seen.deployments.values() if one.order and one.state != "removing"]
        by_name = sorted(orders, key=lambda order: order.name)
        if by_name != sorted(told, key=lambda order: order.name) and not (blocked and by_name):
            self._log(f"cluster {self.cluster.name}: serves {', '.join(one.name for one in orders) or 'nothing'}")
            self._serve.apply(port or seen.port, by_name)
        self._end(mine, seen)

    def _key_settings(self) -> Mapping[str, object] | None:
        """The keys that replicas accept; those of before if they cannot be read, and none at first."""
        try:
            keys = served_keys(self._home)
        except MorayError as error:
            if error.message != self.error:
                self._log(error.message)
            self.error = error.message
            return self._settings or key_settings([])
        return None if keys is None else key_settings(keys)

    def _guarded(self, deployment: Deployment, seen: ServingSeen, blocked: str) -> ServeOrder | None:
        """Advances one deployment. Returns what Serve is to run for it: the same as before, if an error keeps that from
        being known, or if a user was faster."""
        told = seen.deployments.get(deployment.name)
        before = told.order if told else None
        try:
            return self._advance(deployment, told, blocked, before)
        except MorayError as error:  # of the store
            self._deployments.explain(deployment.name, error.message)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if reason != deployment.reason:
                self._log(f"{deployment.name}: {reason}")
            self._deployments.explain(deployment.name, reason)
        return before

    def _advance(
        self, deployment: Deployment, told: DeploymentSeen | None, blocked: str, before: ServeOrder | None
    ) -> ServeOrder | None:
        """Records the decision on one deployment. Returns what Serve is to run for it."""
        memory = self._memory.setdefault(deployment.name, _Memory())
        sight = self._look(deployment, told, blocked, memory)
        action, found = decide_deployment(deployment, sight), None
        if action.add:
            action, found = self._find_target(deployment, sight)
        with self._deployments.unless_changed(deployment) as unchanged:
            if not unchanged:  # the next round decides again
                return before
            self._record(deployment, action, found, memory)
            after = self._deployments.get(deployment.name)
        if found:
            return before
        if action.state == "running" and after.live:
            self._mark(after.name, after.live.reference, memory)
        version = after.live if action.live else after.desired if action.order else None
        return _order(after, version, self._settings) if version else None

    def _find_target(
        self, deployment: Deployment, sight: DeploymentSight
    ) -> tuple[DeploymentAction, FoundModel | None]:
        """The model that the alias names now, if it is to become a version. If it cannot be served, the desired version
        goes on, with the reason."""
        try:
            found = self._models.find(deployment.model)
        except MorayError as error:
            action = decide_deployment(deployment, replace(sight, target=""))
            return replace(action, reason=action.reason or f"{deployment.model}: {error.message}"), None
        action = decide_deployment(deployment, replace(sight, target=found.reference))  # the alias may have moved
        return action, found if action.add else None

    def _mark(self, name: str, reference: str, memory: _Memory) -> None:
        """Sets NAME@deployed when another model is live, and now and then in case somebody has changed it."""
        now = time.monotonic()
        if memory.marked != reference or now >= memory.mark_due:
            self._models.mark(name, reference)
            memory.marked, memory.mark_due = reference, now + _MARK_SECONDS

    def _look(
        self, deployment: Deployment, seen: DeploymentSeen | None, blocked: str, memory: _Memory
    ) -> DeploymentSight:
        version, now = deployment.desired, time.monotonic()
        self.reports.bring(deployment.name)
        live = deployment.live
        ordered, live_ordered = _is_told(seen, version), _is_told(seen, live)
        return DeploymentSight(
            seen=seen,
            ordered=ordered,
            target=self._target(deployment, memory),
            blocked=blocked,
            gone=self._models.gone(version.model.folder) if version and not ordered else "",
            live_ordered=live_ordered,
            live_gone=self._models.gone(live.model.folder) if live and not live_ordered and not ordered else "",
            room=self._room(version, seen, memory) if version and seen else "",
            retry_in=memory.retry_at - now,
            starts_for=_starts_for(version, seen if ordered else None, memory, now),
            lives_for=self._deployments.clock() - version.since if version else 0.0,
            answers=self.reports.answers(deployment, version) if version else Answers(),
        )

    def _record(
        self, deployment: Deployment, action: DeploymentAction, found: FoundModel | None, memory: _Memory
    ) -> None:
        name = deployment.name
        if found:
            known = (deployment.desired or deployment.versions[-1]).model
            self._deployments.add_version(
                name, found.reference, known.model_copy(update={"folder": found.folder, "reference": found.reference})
            )
            self._log(f"{name}: {deployment.model} is now {found.reference}")
        for move in action.moves:
            self._deployments.move_version(name, move.number, move.state, move.reason)
            self._log(f"{name}: version {move.number} is {move.state} {move.reason}".rstrip())
        if action.back_to:
            self._deployments.return_to(deployment, action.back_to, action.reason)
            self._log(f"{name}: back to version {action.back_to.number}: {action.reason}")
        if action.pause and memory.retry_at <= time.monotonic():
            pause = min(_LONGEST_RETRY, _SHORTEST_RETRY * 2 ** min(memory.failures, _MOST_DOUBLINGS))
            memory.failures, memory.retry_at = memory.failures + 1, time.monotonic() + pause
        if action.state != deployment.state:
            self._log(f"{name}: {action.state} {action.reason}".rstrip())
        if action.state == "running":
            memory.failures = 0
        self._deployments.move(name, action.state, action.reason)

    def _end(self, mine: Sequence[Deployment], seen: ServingSeen) -> None:
        """Ends the deployments that Serve no longer lists; with the last one, Serve too."""
        ended = [one for one in mine if one.wanted == "stopped" and one.name not in seen.deployments]
        if not ended:
            return
        wanted = any(one.wanted == "running" for one in self._deployments.all(self.cluster.name))
        if len(ended) == len(mine) and not wanted and seen.port and not seen.deployments and not seen.others:
            self._serve.shut_down()
        for one in ended:
            try:
                self._models.unmark(one.name)  # first, so that it is tried again if the store is away
            except MorayError as error:
                self._log(f"{one.name}: {error.message}")
                continue
            if self._deployments.end(one.name):
                self._memory.pop(one.name, None)
                self._log(f"{one.name}: stopped")

    def _blocked(self, port: int, seen: ServingSeen) -> str:
        """Why Serve cannot be told to serve at `port` now."""
        if not seen.port:
            if self.cluster.store or is_free(port, self._serve.host):
                return ""
            return f"port {port} of this machine is in use by another program; free it, or stop and deploy with --port"
        if seen.port == port:
            return ""
        runs = [name for name, one in seen.deployments.items() if one.order is None]
        if runs:
            return f"a run serves its model with Ray Serve at port {seen.port}; waiting for it to end"
        if seen.others:
            return f"Ray Serve runs on this cluster already, at port {seen.port}; deploy with --port {seen.port}"
        return self._move(port, seen)

    def _move(self, port: int, seen: ServingSeen) -> str:
        """Stops Serve, which cannot change its port, to start it at another one. Returns what is going on."""
        if not self.cluster.store and not is_free(port, self._serve.host):
            return f"port {port} of this machine is in use; serving goes on at port {seen.port}"
        if seen.deployments:  # their open requests are finished first
            self._serve.apply(seen.port, [])
        else:
            self._serve.shut_down()
        return f"Ray Serve moves to port {port}"

    def _target(self, deployment: Deployment, memory: _Memory) -> str:
        if not deployment.follows:
            return ""
        now = time.monotonic()
        if now >= memory.target_due or memory.alias != deployment.model:
            memory.alias, memory.target = deployment.model, self._models.target(deployment.model)
            memory.target_due = now + (_ALIAS_SECONDS if self._models.remote else 0.0)
        return memory.target

    def _room(self, version: Version, seen: DeploymentSeen, memory: _Memory) -> str:
        """Why a replica has no place yet, once it has waited for some seconds."""
        if _is_placed(seen):
            memory.unplaced_since = None
            return ""
        now = time.monotonic()
        memory.unplaced_since = memory.unplaced_since or now
        if now - memory.unplaced_since < _ROOM_SECONDS:
            return ""
        return room_reason(version.model.resources, self.cluster.backend.usage())


def _is_placed(seen: DeploymentSeen) -> bool:
    return all(one.host for one in seen.replicas if one.state == "starting")


def _starts_for(version: Version | None, seen: DeploymentSeen | None, memory: _Memory, now: float) -> float:
    """Seconds for which all replicas of the desired version have had their places. seen: if Serve runs the version."""
    if version is None or seen is None or not _is_placed(seen):
        memory.placed_since = None
        return 0.0
    if memory.placed_since is None or memory.version != version.number:
        memory.placed_since, memory.version = now, version.number
    return now - memory.placed_since


def _is_told(seen: DeploymentSeen | None, version: Version | None) -> bool:
    """Whether Serve was told to run this version."""
    if seen is None or seen.order is None or version is None or seen.state == "removing":
        return False
    return dict(seen.order.arguments) == _arguments(version)


def _order(deployment: Deployment, version: Version, settings: Mapping[str, object] | None) -> ServeOrder:
    most = max(deployment.most_replicas, deployment.replicas)
    target = deployment.target_tokens if most > deployment.replicas else 0
    return ServeOrder(deployment.name, _arguments(version), deployment.replicas, most, target, settings)


def _arguments(version: Version) -> dict[str, object]:
    return dict(version.model.model_dump(mode="json"))
