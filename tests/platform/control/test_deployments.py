"""Deployments in a simulation: Serve forgets, fails and goes away; aliases move; models break, vanish and come back.

Database, aliases, artifacts, rules and rounds are real; Serve and the clock are simulated.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.platform.control import deployment_rounds
from moray.platform.control.choices import LOCAL
from moray.platform.control.database import Database
from moray.platform.control.deployment_rounds import DeploymentRounds
from moray.platform.control.deployments import Deployment, Deployments, NewDeployment
from moray.platform.control.jobs import ConflictError, NotFoundError
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.served_models import ServedModels
from moray.platform.core.cluster import BackendUnreachableError, Topology, Usage
from moray.platform.core.errors import InputError
from moray.platform.core.events import ServingEvent
from moray.platform.core.home import Home
from moray.platform.core.ports import free_port
from moray.platform.core.serve_options import ServeOptions
from moray.platform.core.serving import DeploymentSeen, ReplicaSeen, ServeOrder, ServingBackend, ServingSeen
from moray.platform.store.artifacts import ArtifactStore
from tests.examples import examples
from tests.step_contexts import manifest_of

PORT = free_port()


@dataclass
class Application:
    """An application in the simulated Serve. progress: rounds since it was told. old: a replica of an earlier order
    still answers."""

    order: ServeOrder | None
    progress: int = 0
    failed: bool = False
    old: bool = False


@dataclass
class World(ServingBackend):
    """A Serve instance that starts replicas slowly. broken: folders whose models do not load."""

    host: str = "127.0.0.1"
    port: int = 0
    away: bool = False
    placed: bool = True
    others: int = 0
    broken: set[str] = field(default_factory=set)
    applications: dict[str, Application] = field(default_factory=dict)
    told: int = 0

    def observe(self) -> ServingSeen:
        self._reach()
        if not self.port:
            return ServingSeen()
        seen = {name: self._seen(one) for name, one in self.applications.items()}
        return ServingSeen(self.host, self.port, ("127.0.0.1",), seen, self.others)

    def apply(self, port: int, orders: Sequence[ServeOrder]) -> None:
        self._reach()
        self.told += 1
        self.port = self.port or port
        runs = {name: one for name, one in self.applications.items() if one.order is None}
        before = self.applications
        self.applications = runs | {
            order.name: before[order.name]
            if order.name in before and before[order.name].order == order
            else self._told(before.get(order.name), order)
            for order in orders
        }

    def shut_down(self) -> None:
        self._reach()
        self.port, self.applications = 0, {}

    def live(self) -> None:
        """A second passes."""
        for one in self.applications.values():
            one.progress += 1
            one.failed = bool(one.order) and str(one.order.arguments["folder"]) in self.broken and one.progress > 1

    def usage(self) -> Usage:
        return Usage(2.0, 2.0, 0.0, 0.0, 1)

    def _seen(self, one: Application) -> DeploymentSeen:
        ready = one.progress > 1 and not one.failed and self.placed
        state = "failed" if one.failed else "running" if ready else "starting"
        replicas = [ReplicaSeen("r", "running" if ready else "starting", "127.0.0.1" if self.placed else "")]
        if ready:
            one.old = False
        replicas += [ReplicaSeen("old", "running", "127.0.0.1")] if one.old else []
        return DeploymentSeen(state, "ValueError: not a model" if one.failed else "", one.order, tuple(replicas))

    def _told(self, before: Application | None, order: ServeOrder) -> Application:
        if before is None or before.order is None:
            return Application(order)
        if before.order.arguments == order.arguments:  # another number of replicas
            return Application(order, progress=2)
        return Application(order, old=before.old or (before.progress > 1 and not before.failed))

    def _reach(self) -> None:
        if self.away:
            raise BackendUnreachableError("away")


class Plane:
    """Records, models and rounds over one World."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "home")
        self.store = ArtifactStore(self.home)
        self.world = World()
        self.clock = SimpleNamespace(now=1_000_000.0)
        self.database = Database(self.home.database, durable=False)
        self.deployments = Deployments(self.database, lambda: self.clock.now)
        self.logged: list[str] = []
        self.restart()

    def restart(self) -> None:
        """The controller starts again."""
        cluster = ManagedCluster(LOCAL, self.world, 1, lambda: Topology(2, 0, 1), serving=self.world)  # type: ignore[arg-type]
        self.rounds = DeploymentRounds(self.home, self.deployments, cluster, self.logged.append)
        self.models = ServedModels(self.home, cluster)

    def model(self, fingerprint: str) -> str:
        """An artifact with a model; returns its reference."""
        folder = self.store.prepare("export", fingerprint, keep_leftovers=False)
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
        return self.store.commit(manifest_of("export", fingerprint, "model")).reference

    def folder(self, fingerprint: str) -> Path:
        return self.store.folder("export", fingerprint)

    def alias(self, fingerprint: str, name: str = "prose") -> None:
        self.store.aliases.set(name, "newest", f"export/{fingerprint}")

    def deploy(self, model: str = "prose", name: str = "", **options: object) -> Deployment:
        port = options.pop("port", PORT)
        found = self.models.find(model)
        new = NewDeployment(model=found.model, name=name, port=port, options=ServeOptions(**options))  # type: ignore[arg-type]
        return self.deployments.deploy(new, found.reference, found.folder, 0, self.rounds.reports.base)

    def run(self, rounds: int = 8) -> None:
        for _ in range(rounds):
            self.rounds.round()
            self.world.live()
            self.clock.now += 1.0

    def get(self, name: str = "prose") -> Deployment:
        return self.deployments.get(name)

    def report(self, version: int, requests: int, failed: int, name: str = "prose", replica: str = "") -> None:
        """What a replica says now, by the simulated clock."""
        folder = self.home.root / "deployments" / name / "events"
        replica = replica or secrets.token_hex(4)
        event = ServingEvent(
            deployment=name, version=str(version), reference="", replica=replica, requests=requests, failed=failed,
            time=self.clock.now,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"replica-{replica}.jsonl").open("a") as file:
            file.write(event.model_dump_json() + "\n")


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    plane = Plane(tmp_path)
    for name in ("aa", "bb", "cc"):
        plane.model(name)
    plane.alias("aa")
    return plane


def states(deployment: Deployment) -> list[str]:
    return [one.state for one in deployment.versions]


def test_a_model_is_served_until_it_is_stopped(plane: Plane) -> None:
    assert plane.deploy().state == "pending"
    plane.run(2)
    assert plane.get().state == "starting"
    plane.run()
    assert (plane.get().state, plane.get().reason, states(plane.get())) == ("running", "", ["live"])
    order = plane.world.applications["prose"].order
    assert order.arguments["folder"] == str(plane.folder("aa"))
    assert plane.store.aliases.all()["prose@deployed"] == "export/aa"
    plane.deployments.stop("prose")
    plane.run()
    assert plane.get().state == "stopped"
    assert plane.world.port == 0  # with the last deployment, Serve ends
    assert "prose@deployed" not in plane.store.aliases.all()
    plane.deploy()
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["live"])


def test_a_settled_deployment_is_left_alone(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    told, logged = plane.world.told, list(plane.logged)
    plane.restart()
    plane.run(30)
    assert (plane.world.told, plane.logged) == (told, logged)


def test_what_serve_forgets_it_is_told_again(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.world.applications.clear()
    plane.run(2)
    assert plane.get().state == "starting"
    plane.run()
    assert plane.get().state == "running"
    plane.world.port, plane.world.applications = 0, {}  # a cluster that was recreated
    plane.restart()
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["live"])


def test_an_alias_is_followed(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.alias("bb")
    plane.run(3)
    assert plane.get().state == "rolling"
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["replaced", "live"])
    assert plane.world.applications["prose"].order.arguments["folder"] == str(plane.folder("bb"))
    plane.alias("cc")
    plane.run(2)
    plane.alias("bb")  # before the version of cc is ready
    plane.run(12)
    assert plane.get().live.reference == "export/bb"
    assert plane.get().state == "running"


def test_a_rollover_is_taken_back(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.alias("bb")
    plane.run(2)
    plane.deployments.rollback("prose")  # to the version that answers, not to one before it
    assert states(plane.get()) == ["live", "failed"]
    plane.run()
    assert (plane.get().state, plane.get().live.reference) == ("running", "export/aa")


def test_after_a_restart_in_a_rollover_the_live_version_answers_first(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.world.broken = {str(plane.folder("bb"))}
    plane.alias("bb")
    plane.run(2)
    plane.world.port, plane.world.applications = 0, {}
    plane.restart()
    plane.run(1)
    assert plane.world.applications["prose"].order.arguments["folder"] == str(plane.folder("aa"))
    assert plane.get().state == "starting"
    plane.run(20)
    assert (plane.get().state, states(plane.get())) == ("running", ["live", "failed"])


def test_an_alias_of_something_else_stops_nothing(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    folder = plane.store.prepare("tokens", "tt", keep_leftovers=False)
    (folder / "x").write_text("")
    plane.store.commit(manifest_of("tokens", "tt", "tokens"))
    plane.store.aliases.set("prose", "newest", "tokens/tt")
    plane.world.port, plane.world.applications = 0, {}
    plane.restart()
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["live"])
    assert "not a model" in plane.get().reason


def test_a_new_deployment_of_a_name_has_no_history_and_no_requests(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.report(1, requests=10, failed=10)
    assert plane.rounds.reports.answers(plane.get(), plane.get().live).requests == 10
    plane.deployments.stop("prose")
    plane.run()
    plane.deployments.remove("prose")
    plane.clock.now += 10.0
    plane.deploy()
    plane.run()
    assert not plane.rounds.reports.events(plane.get())
    assert plane.rounds.reports.answers(plane.get(), plane.get().live).requests == 0
    assert [row["state"] for row in plane.deployments.history("prose")] == ["starting", "starting", "live", "running"]


def test_a_user_is_not_overruled_by_a_round(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision that was made before the user acted is dropped."""
    plane.deploy()
    plane.run(3)
    decide = deployment_rounds.decide_deployment

    def slow(*arguments):
        plane.deployments.stop("prose")
        return decide(*arguments)

    monkeypatch.setattr(deployment_rounds, "decide_deployment", slow)
    plane.run(1)
    assert plane.get().state == "stopping"
    monkeypatch.undo()
    plane.run()
    assert (plane.get().state, plane.get().reason) == ("stopped", "stopped by a user")


def test_a_deployment_that_is_removed_during_a_round_is_left_out(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.deploy()
    plane.run()
    decide = deployment_rounds.decide_deployment

    def slow(*arguments):
        plane.deployments.stop("prose")
        plane.deployments.move("prose", "stopped")
        plane.deployments.remove("prose")
        return decide(*arguments)

    monkeypatch.setattr(deployment_rounds, "decide_deployment", slow)
    plane.rounds.round()
    assert not plane.deployments.all()


def test_a_version_that_does_not_start_is_rolled_back(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.world.broken = {str(plane.folder("bb"))}
    plane.alias("bb")
    plane.run(20)
    found = plane.get()
    assert (found.state, states(found)) == ("running", ["live", "failed"])
    assert found.reason == "version 2 failed: ValueError: not a model"
    assert plane.world.applications["prose"].order.arguments["folder"] == str(plane.folder("aa"))
    told = plane.world.told
    plane.run(50)
    assert plane.world.told == told  # a state with a reason, not a loop
    plane.alias("cc")
    plane.run()
    assert (plane.get().reason, plane.get().live.reference) == ("", "export/cc")


def test_a_first_version_that_does_not_start_ends_in_a_state_with_its_reason(plane: Plane) -> None:
    plane.world.broken = {str(plane.folder("aa"))}
    plane.deploy()
    plane.run(20)
    assert (plane.get().state, plane.get().reason) == ("failed", "ValueError: not a model")
    assert not plane.world.applications
    plane.world.broken = set()
    plane.deploy()  # a person tries again
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["failed", "live"])


def test_a_version_whose_answers_fail_is_rolled_back(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.alias("bb")
    plane.run()
    plane.report(2, requests=4, failed=4)  # too few to tell
    plane.run(2)
    assert states(plane.get()) == ["replaced", "live"]
    plane.report(2, requests=10, failed=3)
    plane.run()
    found = plane.get()
    assert (found.state, states(found), found.live.reference) == ("running", ["live", "failed"], "export/aa")
    assert found.reason == "version 2 failed: 7 of 14 answers failed"


def test_an_earlier_version_takes_over_only_when_it_is_ready(plane: Plane) -> None:
    """A rollback is a rollover: until the earlier version is ready, the live one answers."""
    plane.deploy()
    plane.run()
    plane.alias("bb")
    plane.run()
    plane.deployments.rollback("prose")
    assert states(plane.get()) == ["starting", "live"]
    plane.run(2)
    assert (plane.get().state, plane.get().live.reference) == ("rolling", "export/bb")
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["live", "failed"])
    plane.run(20)  # the alias still names the version that was rolled back
    assert states(plane.get()) == ["live", "failed"]


@pytest.mark.parametrize("problem", ["gone", "broken"])
def test_a_rollback_to_a_version_that_does_not_start_takes_nothing_away(plane: Plane, problem: str) -> None:
    plane.deploy()
    plane.run()
    plane.alias("bb")
    plane.run()
    if problem == "gone":
        shutil.rmtree(plane.folder("aa"))
    else:
        plane.world.broken = {str(plane.folder("aa"))}
    plane.report(2, requests=10, failed=10)
    plane.run(30)
    assert (plane.get().state, states(plane.get())) == ("running", ["failed", "live"])
    assert plane.world.applications["prose"].order.arguments["folder"] == str(plane.folder("bb"))
    assert "version 1 failed" in plane.get().reason


def test_a_rollback_is_taken_back(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.alias("bb")
    plane.run()
    plane.deployments.rollback("prose")
    plane.run(2)
    plane.deployments.rollback("prose")
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["replaced", "live"])
    assert plane.get().reason == ""


def test_a_version_that_has_waited_for_room_gets_its_time_to_start(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(deployment_rounds, "time", SimpleNamespace(monotonic=lambda: now[0]))
    plane.world.placed = False
    plane.deploy()
    plane.run(3)
    now[0] += 7200.0  # two hours without room, and the wall clock has jumped by a day
    plane.clock.now += 86400.0
    plane.run(1)
    plane.world.live = lambda: None  # placed, but slow
    plane.world.placed = True
    plane.world.applications["prose"].progress = 0
    plane.run(3)
    assert plane.get().state == "starting"
    now[0] += 1801.0
    plane.run(2)
    assert plane.get().state == "failed"
    assert "not ready after 30 minutes" in plane.get().reason


def test_a_stop_and_a_deploy_during_a_round_are_not_lost(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.deploy()
    plane.run()
    plane.deployments.stop("prose")
    unmark = plane.rounds._models.unmark
    monkeypatch.setattr(plane.rounds._models, "unmark", lambda name: (unmark(name), plane.deploy()))
    plane.run(3)
    monkeypatch.undo()
    plane.run()
    assert (plane.get().wanted, plane.get().state) == ("running", "running")
    assert plane.deployments.clusters() == {LOCAL}


def test_a_stop_while_the_cluster_is_away_stays_a_stop(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.deploy()
    plane.run()

    def away() -> None:
        plane.deployments.stop("prose")
        raise BackendUnreachableError("away")

    monkeypatch.setattr(plane.world, "observe", away)
    plane.rounds.round()
    monkeypatch.undo()
    assert (plane.get().wanted, plane.get().state) == ("stopped", "stopping")
    plane.run()
    assert plane.get().state == "stopped"


def test_an_error_of_one_deployment_does_not_hold_up_the_others(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.deploy()
    plane.alias("bb", "verse")
    plane.deploy("verse")
    decide = deployment_rounds.decide_deployment

    def broken(deployment: Deployment, sight: object) -> object:
        if deployment.name == "prose":
            raise OverflowError("too large")
        return decide(deployment, sight)

    monkeypatch.setattr(deployment_rounds, "decide_deployment", broken)
    plane.run()
    assert plane.get("verse").state == "running"
    assert plane.get("prose").reason == "OverflowError: too large"
    assert sum("too large" in line for line in plane.logged) == 1  # not once a second
    monkeypatch.undo()
    plane.run()
    assert (plane.get().state, plane.get().reason) == ("running", "")


def test_a_thousand_failed_starts_are_a_long_pause(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.rounds._memory["prose"].failures = 1024
    plane.world.broken = {str(plane.folder("aa"))}
    plane.world.port, plane.world.applications = 0, {}
    plane.run()
    assert plane.get().state == "failed"
    assert "OverflowError" not in plane.get().reason


def test_an_unreadable_report_is_left_out(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.report(1, requests=3, failed=0, replica="r")
    assert plane.rounds.reports.answers(plane.get(), plane.get().live).requests == 3
    folder = plane.home.root / "deployments" / "prose" / "events"
    with (folder / "replica-r.jsonl").open("a") as file:
        file.write("{not json}\n")
    (folder / "other.jsonl").write_text('{"kind": "of a later version"}\n')
    plane.run(2)
    assert plane.rounds.reports.answers(plane.get(), plane.get().live).requests == 3
    assert (plane.get().state, plane.get().reason) == ("running", "")


def test_failures_of_an_earlier_life_do_not_count(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.report(1, requests=10, failed=9, replica="old")
    plane.clock.now += 3600.0
    for name in ("bb", "cc"):
        plane.alias(name)
        plane.run()
        plane.clock.now += 3600.0
    plane.deployments.rollback("prose", to=1)
    plane.run(20)
    assert (plane.get().live.number, plane.get().state) == (1, "running")


def test_a_new_version_has_the_options_of_the_one_that_serves(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.deploy(max_running=1)
    plane.run()
    plane.deployments.rollback("prose")
    plane.run()
    plane.alias("bb")
    plane.run()
    assert (plane.get().live.reference, plane.get().live.model.options.max_running) == ("export/bb", 256)


def test_a_model_that_was_replaced_at_its_start_is_followed_again(plane: Plane) -> None:
    plane.deploy()
    plane.run(1)
    plane.deploy(max_running=1)  # before the first version is ready
    plane.run()
    assert states(plane.get()) == ["replaced", "live"]
    for name in ("bb", "aa"):
        plane.alias(name)
        plane.run()
    assert plane.get().live.reference == "export/aa"
    assert plane.get().previous.reference == "export/bb"  # never one that was not live


def test_a_failed_model_is_tried_again_after_its_alias_has_named_another(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.world.broken = {str(plane.folder("bb"))}
    plane.alias("bb")
    plane.run(20)
    plane.world.broken = set()
    plane.run()
    assert plane.get().live.reference == "export/aa"  # not by itself
    for name in ("cc", "bb"):
        plane.alias(name)
        plane.run()
    assert plane.get().live.reference == "export/bb"


def test_an_alias_that_was_read_before_a_deploy_makes_no_version(plane: Plane) -> None:
    """On a cluster with a store, aliases are read every ten seconds."""
    plane.deploy()
    plane.run()
    plane.rounds._models.remote = True
    plane.run(2)
    plane.alias("bb")
    plane.deploy()
    plane.run()
    assert states(plane.get()) == ["replaced", "live"]


def test_an_absent_store_does_not_keep_a_deployment_from_stopping(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.deploy()
    plane.run()
    plane.deployments.stop("prose")

    def away(*_: object) -> None:
        raise InputError("the store does not respond", "")

    monkeypatch.setattr(plane.rounds._models, "target", away)
    monkeypatch.setattr(plane.rounds._models, "unmark", away)
    plane.run()
    assert plane.world.port == 0  # nothing serves
    assert plane.get().state == "stopping"
    monkeypatch.undo()
    plane.run(1)
    assert plane.get().state == "stopped"
    assert "prose@deployed" not in plane.store.aliases.all()


def test_a_deployment_of_a_lost_cluster_can_be_removed(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    with pytest.raises(ConflictError, match="is running"):
        plane.deployments.remove("prose")
    plane.deployments.remove("prose", lost=True)
    assert not plane.deployments.all()


def test_failures_long_after_a_rollover_are_not_the_versions(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.alias("bb")
    plane.run()
    plane.clock.now += 3600.0
    plane.report(2, requests=10, failed=10)
    plane.run()
    assert states(plane.get()) == ["replaced", "live"]


def test_a_user_rolls_back(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    with pytest.raises(ConflictError, match="no earlier version"):
        plane.deployments.rollback("prose")
    for name in ("bb", "cc"):
        plane.alias(name)
        plane.run()
    plane.deployments.rollback("prose")
    plane.run()
    assert (plane.get().live.reference, states(plane.get())) == ("export/bb", ["replaced", "live", "failed"])
    assert plane.get().reason == "version 3 failed: rolled back by a user"
    plane.deployments.rollback("prose", to=1)
    plane.run()
    assert plane.get().live.reference == "export/aa"
    with pytest.raises(ConflictError, match="is the current one"):
        plane.deployments.rollback("prose", to=1)
    with pytest.raises(ConflictError, match="no version 9"):
        plane.deployments.rollback("prose", to=9)
    plane.model("dd")
    plane.alias("dd")  # a model that nobody has seen is followed again
    plane.run()
    assert plane.get().live.reference == "export/dd"
    said = [(row["version"], row["state"]) for row in plane.deployments.history("prose")]
    assert (3, "failed") in said
    assert (4, "live") in said


def test_a_model_that_is_gone_is_a_state_with_a_reason(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    shutil.move(plane.folder("aa"), plane.home.root / "away")
    plane.run(5)
    assert plane.get().state == "running"  # its replicas have it in memory
    plane.world.port, plane.world.applications = 0, {}
    plane.run(5)
    assert plane.get().state == "failed"
    assert "is gone: it has no config.json" in plane.get().reason
    told = plane.world.told
    plane.run(20)
    assert plane.world.told == told
    shutil.move(plane.home.root / "away", plane.folder("aa"))
    plane.run()
    assert plane.get().state == "running"


def test_a_damaged_alias_changes_nothing(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    (plane.home.aliases / "prose@newest").write_text("")
    plane.run()
    assert (plane.get().state, states(plane.get())) == ("running", ["live"])
    plane.store.aliases.set("prose", "newest", "export/none")  # an artifact that does not exist
    plane.run()
    assert states(plane.get()) == ["live"]
    assert "unknown artifact" in plane.get().reason
    plane.alias("bb")
    plane.run()
    assert (plane.get().live.reference, plane.get().reason) == ("export/bb", "")


def test_a_live_version_that_fails_to_start_is_tried_again_ever_less_often(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_rounds.time, "monotonic", lambda: plane.clock.now)
    plane.deploy()
    plane.run()
    plane.world.broken = {str(plane.folder("aa"))}
    plane.world.port, plane.world.applications = 0, {}
    plane.run(20)
    assert plane.get().state == "failed"
    assert "next try in" in plane.get().reason
    told = plane.world.told
    plane.run(600)
    assert plane.world.told - told < 12
    plane.world.broken = set()
    plane.run(700)
    assert (plane.get().state, states(plane.get())) == ("running", ["live"])


def test_no_room_is_said(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment_rounds.time, "monotonic", lambda: plane.clock.now)
    plane.world.placed = False
    plane.deploy()
    plane.run(12)
    assert plane.get().state == "starting"
    assert plane.get().reason == "no room for a replica, which needs 0.5 CPU: 2 of 2 CPUs are reserved"
    plane.world.placed = True
    plane.run()
    assert (plane.get().state, plane.get().reason) == ("running", "")


def test_a_cluster_that_is_away_changes_no_state(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.world.away = True
    plane.run()
    assert (plane.get().state, plane.get().reason) == ("running", "the cluster does not respond: away")
    plane.deployments.stop("prose")
    plane.run()
    assert plane.get().state == "stopping"
    plane.world.away = False
    plane.run()
    assert plane.get().state == "stopped"


def test_several_deployments_share_one_ingress(plane: Plane) -> None:
    plane.deploy()
    plane.deploy("export/bb", name="code")
    plane.run()
    assert {one.name: one.state for one in plane.deployments.all()} == {"code": "running", "prose": "running"}
    with pytest.raises(ConflictError, match=f"are served at port {PORT}"):
        plane.deploy("export/cc", name="third", port=PORT + 1)
    plane.deployments.stop("code")
    plane.run()
    assert (plane.get("code").state, plane.get().state) == ("stopped", "running")
    assert plane.world.port == PORT


def test_more_replicas_are_no_new_version(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    plane.deploy(replicas=2, most_replicas=5)
    plane.run()
    order = plane.world.applications["prose"].order
    assert (order.replicas, order.most_replicas, states(plane.get())) == (2, 5, ["live"])
    plane.deploy(replicas=2, most_replicas=5, threads=2)
    plane.run()
    assert states(plane.get()) == ["replaced", "live"]


def test_a_run_that_serves_is_waited_for(plane: Plane) -> None:
    plane.world.port = PORT + 7
    plane.world.applications["smoke-prose"] = Application(None, progress=5)
    plane.deploy()
    plane.run(5)
    assert plane.get().state == "pending"
    assert f"a run serves its model with Ray Serve at port {PORT + 7}" in plane.get().reason
    plane.world.port, plane.world.applications = 0, {}
    plane.run()
    assert (plane.get().state, plane.world.port) == ("running", PORT)


def test_serve_of_another_program_is_left_alone(plane: Plane) -> None:
    plane.world.port, plane.world.others = PORT + 7, 1
    plane.deploy()
    plane.run()
    assert plane.get().state == "pending"
    assert f"deploy with --port {PORT + 7}" in plane.get().reason
    plane.deploy(port=PORT + 7)
    plane.run()
    assert plane.get().state == "running"
    plane.deployments.stop("prose")
    plane.run()
    assert (plane.get().state, plane.world.port) == ("stopped", PORT + 7)


def test_another_port_restarts_serve(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        plane.deploy(port=port)
        plane.run()
        assert (plane.get().state, plane.world.port) == ("running", PORT)  # it answers where it did
        assert f"port {port} of this machine is in use" in plane.get().reason
    plane.run()
    assert (plane.get().state, plane.world.port, states(plane.get())) == ("running", port, ["live"])


def test_a_removed_name_is_free(plane: Plane) -> None:
    plane.deploy()
    plane.run()
    with pytest.raises(ConflictError, match="is running"):
        plane.deployments.remove("prose")
    plane.deployments.stop("prose")
    plane.run()
    plane.deployments.remove("prose")
    with pytest.raises(NotFoundError, match="unknown deployment"):
        plane.get()
    plane.deploy()
    plane.run()
    assert [one.number for one in plane.get().versions] == [1]


@pytest.mark.parametrize("name", ["Prose", "1a", "v1", "health", "smoke-x", "a b", "a" * 64, "../a", "ä"])
def test_names_that_cannot_be_a_path_are_refused(plane: Plane, name: str) -> None:
    with pytest.raises(InputError):
        plane.deployments.deploy(NewDeployment.model_construct(model="prose@newest", name=name), "export/aa", "/x", 0)
    assert not plane.deployments.all()


@pytest.mark.parametrize("model", ["prase", "prose@oldest", "export/zz", "/nowhere", "", "tokenizer/aa"])
def test_models_that_do_not_exist_are_refused(plane: Plane, model: str) -> None:
    with pytest.raises(InputError):
        plane.models.find(model)


@pytest.mark.parametrize(
    "options",
    [{"replicas": 0}, {"replicas": 3, "most_replicas": 2}, {"replicas": 10**6}, {"cpus": -1.0}, {"gpus": 2},
     {"device": "cuda"}, {"gpus": 1}, {"cpus": float("nan")}],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(plane: Plane, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        plane.deploy(**options)
    assert not plane.deployments.all()


EVENTS = (
    "alias",
    "break",
    "mend",
    "forget",
    "recreate",
    "away",
    "back",
    "restart",
    "stop",
    "deploy",
    "rollback",
    "fail",
)


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**32), events=st.lists(st.sampled_from(EVENTS), max_size=25))
def test_whatever_happens_it_settles_as_recorded(
    tmp_path_factory: pytest.TempPathFactory, seed: int, events: list[str]
) -> None:
    """After the last fault, Serve runs what the record says, and is told nothing more."""
    with pytest.MonkeyPatch.context() as patch:
        plane = Plane(tmp_path_factory.mktemp("plane"))
        patch.setattr(deployment_rounds.time, "monotonic", lambda: plane.clock.now)
        _check_that_it_settles(plane, seed, events)


def _check_that_it_settles(plane: Plane, seed: int, events: Sequence[str]) -> None:
    chance = random.Random(seed)
    names = [f"m{index}" for index in range(4)]
    for name in names:
        plane.model(name)
    plane.alias("m0")
    plane.deploy()
    for event in events:
        _happen(plane, event, chance, names)
        plane.run(chance.randrange(4))
    plane.world.away = False
    plane.world.broken = set()
    plane.run(3)
    plane.clock.now += 1000.0  # longer than the pause between two tries
    plane.run(25)
    told = plane.world.told
    plane.run(10)
    assert plane.world.told == told
    found = plane.get()
    assert states(found).count("live") <= 1
    assert "starting" not in states(found)
    if found.wanted == "stopped":
        assert (found.state, plane.world.applications, plane.world.port) == ("stopped", {}, 0)
    elif found.live is None:
        assert (found.state, bool(found.reason), plane.world.applications) == ("failed", True, {})
    else:
        assert found.state == "running"
        assert plane.world.applications["prose"].order.arguments["version"] == str(found.live.number)
        target = plane.store.aliases.all()["prose@newest"]
        failed = {one.reference for one in found.versions if one.state == "failed"}
        assert found.live.reference == target or target in failed


def _happen(plane: Plane, event: str, chance: random.Random, names: Sequence[str]) -> None:
    world = plane.world
    if event == "alias":
        plane.alias(chance.choice(names))
    elif event == "break":
        world.broken.add(str(plane.folder(chance.choice(names))))
    elif event == "mend":
        world.broken.clear()
    elif event == "forget":
        world.applications.clear()
    elif event == "recreate":
        world.port, world.applications = 0, {}
    elif event in ("away", "back"):
        world.away = event == "away"
    elif event == "restart":
        plane.restart()
    elif event == "stop":
        plane.deployments.stop("prose")
    elif event == "deploy":
        plane.deploy(replicas=chance.choice([1, 2]), threads=chance.choice([1, 1, 2]))
    elif event == "rollback":
        with contextlib.suppress(ConflictError):
            plane.deployments.rollback("prose")
    elif event == "fail" and (live := plane.get().live):
        plane.report(live.number, requests=10, failed=10)
