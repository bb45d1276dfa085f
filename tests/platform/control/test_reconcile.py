"""The controller in a simulation: drivers die, the cluster is unreachable or reports wrong states, jobs are stopped.

Database, queue, reconcile and run folders are real; the cluster and the clock are simulated.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.platform.control import attempt as attempt_module
from moray.platform.control import cluster_rounds
from moray.platform.control import controller as controller_module
from moray.platform.control.attempt import LocalFiles, Outcome
from moray.platform.control.choices import LOCAL
from moray.platform.control.controller import Controller
from moray.platform.control.database import Database
from moray.platform.control.jobs import ENDED, IN_FLIGHT, ConflictError, Jobs, Submission
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.queue import choose_jobs
from moray.platform.control.reconcile import LOSSES, START_SECONDS, AttemptObservation, decide_attempt, decide_job
from moray.platform.core.cluster import (
    BackendUnreachableError,
    ClusterBackend,
    ExecutorState,
    Observed,
    Topology,
    Usage,
)
from moray.platform.core.home import Home
from tests.examples import examples
from tests.small_run import recipe_text, write_text

TOPOLOGY = Topology(2, 0, 1 << 30)


@dataclass
class Driver:
    """A driver in the simulated cluster: the state that Ray reports, and whether the driver is alive."""

    state: ExecutorState = "pending"
    alive: bool = False
    begun: int = 0
    told: bool = False


@dataclass
class World(ClusterBackend):
    """A cluster that may be unreachable, may lose jobs, and reports dead drivers as running."""

    home: Home
    chance: random.Random
    now: float = 1_000_000.0
    away: bool = False
    drivers: dict[str, Driver] = field(default_factory=dict)
    most_alive: Counter[str] = field(default_factory=Counter)

    def submit(self, attempt: str, environment: Mapping[str, str]) -> None:
        self._reach()
        self.drivers.setdefault(attempt, Driver())
        if self.chance.random() < 0.2:
            raise BackendUnreachableError("the answer was lost")

    def observe(self) -> Mapping[str, Observed]:
        self._reach()
        return {name: Observed(driver.state) for name, driver in self.drivers.items()}

    def stop(self, attempt: str) -> None:
        self._reach()
        if attempt in self.drivers:
            self.drivers[attempt].told = True

    def forget(self, attempt: str) -> None:
        self._reach()
        self.drivers.pop(attempt, None)

    def usage(self) -> Usage:
        self._reach()
        return Usage(2, 0, 0, 0, 1)

    def _reach(self) -> None:
        if self.away:
            raise BackendUnreachableError("away")

    def live(self, faults: bool) -> None:
        """A second passes; with faults, something goes wrong now and then."""
        self.now += 1.0
        if faults:
            self._misfortune()
        for name, driver in list(self.drivers.items()):
            self._work(name, driver)
        running = Counter(name.rpartition(".")[0] for name, driver in self.drivers.items() if driver.alive)
        for job, count in running.items():
            self.most_alive[job] = max(self.most_alive[job], count)

    def _work(self, name: str, driver: Driver) -> None:
        run = self.home.runs / name
        if driver.state == "pending" and self.chance.random() < 0.7:
            driver.state = "running"
            driver.alive = LocalFiles(run).read_outcome() is None  # a driver that was given up does nothing
        elif driver.alive and driver.told:
            LocalFiles(run).record_outcome(Outcome(state="cancelled"))
            driver.alive, driver.state = False, "stopped"
        elif driver.alive and self.chance.random() < 0.2:
            LocalFiles(run).record_outcome(
                Outcome(state="succeeded" if self.chance.random() < 0.8 else "failed", detail="as it goes")
            )
            driver.alive, driver.state = False, "succeeded"
        elif driver.told and driver.state in ("pending", "running") and not driver.alive:
            driver.state = "stopped"

    def _misfortune(self) -> None:
        throw = self.chance.random()
        living = [driver for driver in self.drivers.values() if driver.alive]
        if throw < 0.05 and living:
            victim = self.chance.choice(living)
            victim.alive = False
            if self.chance.random() < 0.5:  # else a zombie, reported as running indefinitely
                victim.state = "failed"
        elif throw < 0.08:
            self.away = not self.away
        elif throw < 0.10 and self.drivers:
            name = self.chance.choice(list(self.drivers))
            if not self.drivers[name].alive:
                del self.drivers[name]  # the cluster was made anew


def managed(world: World, slots: int) -> ManagedCluster:
    return ManagedCluster(LOCAL, world, slots, lambda: TOPOLOGY)


def make(home: Home, seed: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Controller, World, Database]:
    world = World(home, random.Random(seed))
    clock = SimpleNamespace(time=lambda: world.now, monotonic=lambda: world.now)
    for module in (controller_module, cluster_rounds):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(
        attempt_module,
        "is_stale",
        lambda path: not ((driver := world.drivers.get(path.parent.name)) and driver.alive),
    )
    database = Database(home.database, durable=False)
    return Controller(home, database, managed(world, slots), log=no_errors), world, database


def no_errors(text: str) -> None:
    """The controller logs the error of a failed round; in the simulation every error is a bug."""
    assert "Error: " not in text, text


def submission(folder: Path, **fields: Any) -> Submission:
    folder.mkdir(exist_ok=True)
    if not any(folder.iterdir()):
        write_text(folder)
    return Submission.model_validate({"recipe": recipe_text(folder), "folder": str(folder), **fields})


@settings(max_examples=examples(12))
@given(seed=st.integers(0, 1 << 30), slots=st.integers(1, 3), jobs=st.integers(1, 6), retries=st.integers(0, 2))
def test_every_job_ends_once_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, seed: int, slots: int, jobs: int, retries: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        home = Home(tmp_path_factory.mktemp("home"))
        asked = submission(home.root / "text", retries=retries)
        controller, world, database = make(home, seed, slots, monkeypatch)
        names = [controller.jobs.submit(asked)[0].id for _ in range(jobs)]
        for _ in range(150):
            world.live(faults=True)
            if world.chance.random() < 0.02:
                stop(controller.jobs, world.chance.choice(names))
            if world.chance.random() < 0.03:  # the controller is killed and loses its memory
                controller = Controller(home, database, managed(world, slots), log=no_errors)
            controller.round()
            assert sum(job.state in IN_FLIGHT for job in controller.jobs.open()) <= slots
        world.away = False
        for _ in range(4000):
            if not controller.jobs.open():
                break
            world.live(faults=False)
            controller.round()
        assert not controller.jobs.open(), "a job never ended"
        prove(database, names)
        assert all(count == 1 for count in world.most_alive.values()), "two drivers of one job lived at once"
        database.close()


def stop(jobs: Jobs, name: str) -> None:
    if jobs.get(name).state not in ENDED:
        jobs.request_stop(name)


def prove(database: Database, names: list[str]) -> None:
    rows = database.read().execute("SELECT kind, id, state FROM transitions").fetchall()
    ended = Counter((row["kind"], row["id"]) for row in rows if row["state"] in (*ENDED, "lost"))
    assert set(ended.values()) <= {1}, ended
    assert {name for kind, name in ended if kind == "job"} == set(names)
    attempts = {row["id"] for row in rows if row["kind"] == "attempt"}
    assert {name for kind, name in ended if kind == "attempt"} == attempts


def test_a_stopped_job_never_succeeds_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, world, _ = make(Home(tmp_path), 3, 1, monkeypatch)
    job = controller.jobs.submit(submission(tmp_path / "text"))[0]
    controller.round()
    name = f"{job.id}.1"
    world.drivers[name] = Driver("pending")
    controller.jobs.request_stop(job.id)
    for _ in range(int(START_SECONDS) + 5):
        world.now += 1
        controller.round()
    assert controller.jobs.get(job.id).state == "cancelled"
    assert not LocalFiles(tmp_path / "runs" / name).record_outcome(Outcome(state="succeeded")), (
        "the controller had the last word"
    )


def test_a_zombie_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reports a job as running indefinitely if its driver died with its node."""
    controller, world, _ = make(Home(tmp_path), 1, 1, monkeypatch)
    job = controller.jobs.submit(submission(tmp_path / "text"))[0]
    controller.round()
    world.drivers[f"{job.id}.1"] = Driver("running", alive=True)
    controller.round()
    assert controller.jobs.get(job.id).state == "running"
    world.drivers[f"{job.id}.1"].alive = False
    for _ in range(30):
        world.now += 1
        controller.round()
    latest = controller.jobs.get(job.id)
    assert latest.attempts[0].state == "lost"
    assert "the driver died" in latest.attempts[0].detail
    assert len(latest.attempts) == 2, "it is tried again"


def test_a_driver_that_never_starts_is_given_up_though_the_controller_is_killed_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray keeps a job pending indefinitely if its node died before the driver started."""
    controller, world, database = make(Home(tmp_path), 5, 1, monkeypatch)
    job = controller.jobs.submit(submission(tmp_path / "text"))[0]
    for second in range(int(START_SECONDS) + 30):
        world.now += 1
        if second % 20 == 0:
            controller = Controller(Home(tmp_path), database, managed(world, 1), log=lambda _: None)
        controller.round()
    first = controller.jobs.get(job.id).attempts[0]
    assert first.state == "lost"
    assert "did not start" in first.detail


def test_an_error_of_one_job_does_not_block_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    controller, world, database = make(Home(tmp_path), 1, 2, monkeypatch)
    controller = Controller(Home(tmp_path), database, managed(world, 2), log=said.append)
    broken, sound = (controller.jobs.submit(submission(tmp_path / "text"))[0].id for _ in range(2))
    controller.round()
    (tmp_path / "runs" / f"{broken}.1" / "outcome.json").write_text("not JSON")
    LocalFiles(tmp_path / "runs" / f"{sound}.1").record_outcome(Outcome(state="succeeded"))
    controller.round()
    assert controller.jobs.get(sound).state == "succeeded"
    assert any(line.startswith(f"{broken}: ") for line in said), said


def test_losses_have_a_budget_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, world, _ = make(Home(tmp_path), 1, 1, monkeypatch)
    job = controller.jobs.submit(submission(tmp_path / "text"))[0]
    for _ in range(2000):
        world.now += 1
        for driver in world.drivers.values():
            driver.state = "failed"  # each dies at once
        controller.round()
    ended = controller.jobs.get(job.id)
    assert ended.state == "failed"
    assert [attempt.state for attempt in ended.attempts] == ["lost"] * (LOSSES + 1)
    assert "lost 6 times" in ended.reason


def test_no_attempt_is_lost_while_the_cluster_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, world, _ = make(Home(tmp_path), 1, 1, monkeypatch)
    job = controller.jobs.submit(submission(tmp_path / "text"))[0]
    controller.round()
    world.away = True
    for _ in range(1000):
        world.now += 1
        controller.round()
    assert controller.jobs.get(job.id).attempts[0].ended is None
    assert any("unreachable: away" in line for line in controller.why(controller.jobs.get(job.id)))


def test_priorities_and_retries_decide_the_order(tmp_path: Path) -> None:
    database = Database(tmp_path / "moray.db")
    jobs = Jobs(database)
    made = {
        p: jobs.submit(submission(tmp_path / "text", priority=p))[0] for p in ("batch", "interactive", "production")
    }
    later = jobs.submit(submission(tmp_path / "text", priority="production"))[0]
    jobs.move(made["production"].id, "queued", "failed before", not_before=2e12)
    order = [job.id for job in choose_jobs(jobs.open(), 9, 1e12)]
    assert order == [later.id, made["interactive"].id, made["batch"].id]
    assert choose_jobs(jobs.open(), 0, 1e12) == []


def test_an_exclusive_job_waits_for_the_earlier_ones_of_its_schedule(tmp_path: Path) -> None:
    database = Database(tmp_path / "moray.db")
    jobs = Jobs(database)
    first = jobs.submit(submission(tmp_path / "text"), schedule="s", tick=1.0, exclusive=True)[0]
    second = jobs.submit(submission(tmp_path / "text"), schedule="s", tick=2.0, exclusive=True)[0]
    assert [job.id for job in choose_jobs(jobs.open(), 9, 1e12)] == [first.id]
    jobs.new_attempt(first.id)
    assert choose_jobs(jobs.open(), 9, 1e12) == []
    jobs.move(first.id, "succeeded")
    assert [job.id for job in choose_jobs(jobs.open(), 9, 1e12)] == [second.id]


def test_an_ended_job_keeps_its_state(tmp_path: Path) -> None:
    jobs = Jobs(Database(tmp_path / "moray.db"))
    job = jobs.submit(submission(tmp_path / "text"))[0]
    attempt = jobs.new_attempt(job.id)
    jobs.move_attempt(attempt.id, "succeeded")
    jobs.move(job.id, "succeeded")
    for change in (lambda: jobs.move(job.id, "queued"), lambda: jobs.move_attempt(attempt.id, "lost")):
        with pytest.raises(ConflictError, match="has ended"):
            change()


def test_a_driver_stopped_from_outside_is_lost(tmp_path: Path) -> None:
    jobs = Jobs(Database(tmp_path / "moray.db"))
    job = jobs.submit(submission(tmp_path / "text"))[0]
    attempt = jobs.new_attempt(job.id)
    seen = AttemptObservation(None, alive=False, was_alive=True, outcome=Outcome(state="cancelled"), silent=0.0)
    action = decide_attempt(jobs.get(job.id), attempt, seen)
    assert action.state == "lost"
    assert decide_job(jobs.get(job.id), "lost", action.detail, retryable=True).state == "queued"
