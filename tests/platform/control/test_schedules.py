"""Schedules in the database: whatever is killed, doubled or changed, every tick has one outcome and at most one job."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.platform.control.database import Database
from moray.platform.control.jobs import ConflictError, Jobs, NotFoundError
from moray.platform.control.schedules import NewSchedule, Schedule, Schedules
from moray.platform.core.errors import InputError, RecipeError
from tests.checkout import ROOT
from tests.examples import examples

START = 1_793_000_000.0  # a whole second; intervals count from it
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
RECIPE = "name: tiny\nsteps:\n  corpus: {with: {sources: [{name: here, path: texts, include: ['*.txt']}]}}\n"


@dataclass
class World:
    """A database on disk, a clock that the test moves, and a folder with the recipe's text."""

    folder: Path
    now: float = START

    def __post_init__(self) -> None:
        (self.folder / "texts").mkdir(exist_ok=True)
        (self.folder / "texts" / "a.txt").write_text("some words to read")
        self.open()

    def open(self) -> None:
        self.database = Database(self.folder / "moray.db")
        self.jobs = Jobs(self.database)
        self.schedules = Schedules(self.database, self.jobs, lambda: self.now)

    def add(self, name: str = "steady", **fields: Any) -> Schedule:
        if not {"cron", "every"} & set(fields):
            fields["every"] = "1h"
        return self.schedules.add(NewSchedule(recipe=RECIPE, folder=str(self.folder), name=name, **fields))

    def tick(self, seconds: float = 0.0) -> None:
        """Time passes, and then the controller's loop goes round until nothing is due."""
        self.now += seconds
        self.schedules.tick(self.now)
        while self.schedules.next_wake(self.now) <= self.now:
            self.schedules.tick(self.now)

    def end_jobs(self) -> None:
        for job in self.jobs.open():
            self.jobs.move(job.id, "succeeded")

    def rows(self, query: str = "SELECT * FROM ticks ORDER BY created, tick") -> list[dict[str, Any]]:
        return [dict(row) for row in self.database.read().execute(query).fetchall()]

    def outcomes(self) -> list[tuple[int, int, str]]:
        """(hours from the start to the first tick, number of ticks, outcome) of every row."""
        return [(round((row["tick"] - START) / HOUR), row["count"], row["outcome"]) for row in self.rows()]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.database.close()


def assert_sound(world: World) -> None:
    """What must hold at any time: all ticks up to the cursor, each once; a job for each that ran, and no other job."""
    for row in world.rows("SELECT * FROM schedules"):
        schedule = world.schedules.get(row["name"])
        expected, covered = [], []
        tick = schedule.trigger.after(schedule.created)
        while tick <= schedule.cursor:
            expected.append(tick)
            tick = schedule.trigger.after(tick)
        mine = [t for t in world.rows() if (t["schedule"], t["created"]) == (row["name"], row["created"])]
        for found in mine:
            inside = [t for t in expected if found["tick"] <= t <= found["until"]]
            assert len(inside) == found["count"]
            covered += inside
        assert covered == expected
    ran = {(row["schedule"], row["tick"]): row["job"] for row in world.rows() if row["outcome"] == "run"}
    assert {(job.schedule, job.tick): job.id for job in world.jobs.list(limit=10_000)} == ran
    assert all(bool(row["job"]) is not bool(row["reason"]) for row in world.rows())


def test_a_tick_is_a_job_of_the_schedule(world: World) -> None:
    world.add(overrides=["corpus.sources.0.license=MIT"], priority="production", retries=2)
    world.tick(HOUR - 1)
    assert world.jobs.list() == []
    world.tick(1)
    (job,) = world.jobs.list()
    assert (job.schedule, job.tick, job.name, job.recipe) == ("steady", START + HOUR, "steady", "tiny")
    assert (job.priority, job.retries, job.exclusive, job.state) == ("production", 2, False, "queued")
    assert job.overrides == ("corpus.sources.0.license=MIT",)
    (tick,) = world.schedules.get("steady").ticks
    assert (tick.tick, tick.until, tick.count, tick.outcome, tick.job) == (job.tick, job.tick, 1, "run", job.id)
    logged = [(row["kind"], row["state"]) for row in world.rows("SELECT * FROM transitions ORDER BY sequence")]
    assert logged == [("schedule", "added"), ("job", "queued"), ("tick", "run")]
    assert_sound(world)


def test_ticking_again_decides_nothing_again(world: World) -> None:
    world.add(overlap="allow")
    world.tick(HOUR)
    for _ in range(3):
        world.schedules.tick(world.now)
    world.tick(-30 * MINUTE)  # the clock goes back
    world.tick(30 * MINUTE)
    assert len(world.jobs.list()) == 1
    assert_sound(world)


@pytest.mark.parametrize(
    ("overlap", "jobs", "exclusive"), [("skip", 1, [False]), ("queue", 3, [True] * 3), ("allow", 3, [False] * 3)]
)
def test_overlap(world: World, overlap: str, jobs: int, exclusive: list[bool]) -> None:
    world.add(overlap=overlap)
    for _ in range(3):
        world.tick(HOUR)
    assert [job.exclusive for job in world.jobs.list()] == exclusive
    first = world.jobs.list()[-1].id
    skipped = [row for row in world.rows() if row["outcome"] == "skipped"]
    assert sum(row["count"] for row in skipped) == 3 - jobs
    assert all(row["reason"] == f"job {first} has not ended" for row in skipped)
    for job in world.jobs.open():
        world.jobs.request_stop(job.id)
    world.tick(HOUR)
    assert len(world.jobs.list()) == jobs + 1
    assert_sound(world)


@pytest.mark.parametrize(
    ("catchup", "expected"),
    [("none", [(1, 1, "run"), (2, 24, "skipped")]), ("last", [(1, 1, "run"), (2, 23, "skipped"), (25, 1, "run")])],
)
def test_a_day_of_downtime(world: World, catchup: str, expected: list[tuple[int, int, str]]) -> None:
    world.add(catchup=catchup)
    world.tick(HOUR)
    world.end_jobs()
    world.database.close()
    world.open()
    world.tick(DAY + 5 * MINUTE)
    assert world.outcomes() == expected
    assert_sound(world)


def test_a_year_of_downtime_is_settled_piece_by_piece(world: World) -> None:
    world.add(every="1m", catchup="last")
    world.now += 20_000 * MINUTE + 70
    world.schedules.tick(world.now)
    (row,) = world.rows()
    assert row["count"] < 5000, "one call does a part"
    assert world.schedules.next_wake(world.now) == world.now, "and asks to be called again"
    world.tick()
    # The newest missed tick runs, and the one that is due now finds it at work.
    assert [(row["count"], row["outcome"]) for row in world.rows()] == [(19_999, "skipped"), (1, "run"), (1, "skipped")]
    assert_sound(world)


def test_a_paused_schedule_runs_nothing_then_or_later(world: World) -> None:
    world.add(catchup="last")
    world.tick(HOUR)
    world.end_jobs()
    assert world.schedules.pause("steady").paused
    assert world.schedules.as_json(world.schedules.get("steady"))["next"] is None
    for _ in range(5):
        world.tick(HOUR)
    world.now += 5 * HOUR + 5 * MINUTE  # nobody ticks
    assert not world.schedules.resume("steady").paused
    world.tick()
    assert world.outcomes() == [(1, 1, "run"), (2, 10, "skipped")]
    assert world.rows()[-1]["reason"] == "paused"
    world.tick(HOUR - 5 * MINUTE)
    assert world.outcomes()[-1] == (12, 1, "run")
    assert_sound(world)


def test_ticks_skipped_for_different_reasons_have_rows_of_their_own(world: World) -> None:
    world.add()
    world.now += 3 * HOUR + 5 * MINUTE
    world.schedules.pause("steady")
    world.tick(2 * HOUR)
    assert [(row["count"], row["reason"]) for row in world.rows()] == [(3, "missed"), (2, "paused")]


def test_a_tick_that_came_before_the_pause_is_decided_before_it(world: World) -> None:
    world.add()
    world.now += HOUR + 1
    world.schedules.pause("steady")
    assert world.outcomes() == [(1, 1, "run")]


def test_pausing_twice_is_a_conflict(world: World) -> None:
    world.add()
    with pytest.raises(ConflictError, match="is not paused"):
        world.schedules.resume("steady")
    world.schedules.pause("steady")
    with pytest.raises(ConflictError, match="is already paused"):
        world.schedules.pause("steady")


def test_removing_keeps_jobs_and_ticks_and_frees_the_name(world: World) -> None:
    world.add(overlap="allow")
    world.tick(HOUR)
    world.now += HOUR  # due, and nobody has ticked
    world.schedules.remove("steady")
    assert [(row["outcome"], row["reason"]) for row in world.rows()] == [("run", ""), ("skipped", "removed")]
    with pytest.raises(NotFoundError):
        world.schedules.get("steady")
    world.now = START + 0.25  # the clock goes back: the new schedule has the same instants
    world.add(overlap="allow")
    world.tick(HOUR)
    assert len(world.jobs.list(schedule="steady")) == 2
    assert len(world.schedules.get("steady").ticks) == 1


def test_a_recipe_that_became_invalid_skips_its_ticks_and_affects_no_other(world: World, tmp_path: Path) -> None:
    world.add("broken")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "texts", other / "texts")
    world.schedules.add(NewSchedule(recipe=RECIPE, folder=str(other), name="sound", every="1h"))
    shutil.move(tmp_path / "texts", tmp_path / "away")
    world.tick(HOUR)
    assert [job.schedule for job in world.jobs.list()] == ["sound"]
    (tick,) = world.schedules.get("broken").ticks
    assert tick.outcome == "skipped"
    assert tick.reason.startswith("recipe.yaml:3: steps.corpus.with: sources.0: ")
    shutil.move(tmp_path / "away", tmp_path / "texts")
    world.end_jobs()
    world.tick(HOUR)
    assert sorted(str(job.schedule) for job in world.jobs.list()) == ["broken", "sound", "sound"]
    assert_sound(world)


def test_a_schedule_with_a_removed_time_zone_is_paused_and_can_be_removed(world: World) -> None:
    world.add("a", cron="0 * * * *")
    world.add("b")
    with world.database.write() as connection:
        connection.execute("UPDATE schedules SET tz = 'Mars/Base' WHERE name = 'a'")
    assert world.schedules.next_wake(world.now) == world.now
    world.tick(HOUR)
    assert [job.schedule for job in world.jobs.list()] == ["b"]
    assert [(s.name, s.paused) for s in world.schedules.list()] == [("a", True), ("b", False)]
    (last,) = world.rows("SELECT * FROM transitions WHERE kind = 'schedule' AND state = 'paused'")
    assert "Mars/Base" in last["why"]
    with pytest.raises(InputError, match="Mars/Base"):
        world.schedules.resume("a")
    world.schedules.remove("a")
    assert [s.name for s in world.schedules.list()] == ["b"]


def test_when_to_wake(world: World) -> None:
    assert world.schedules.next_wake(world.now) == float("inf")
    world.add("slow", every="1d")
    world.add("fast", every="30m")
    assert world.schedules.next_wake(world.now) == START + 30 * MINUTE
    assert world.schedules.next_wake(START + 31 * MINUTE) == START + 31 * MINUTE
    world.schedules.pause("fast")
    assert world.schedules.next_wake(world.now) == START + DAY


def test_next_ticks_follow_the_clock_and_the_cursor(world: World) -> None:
    world.add(cron="0 2 * * *", tz="Asia/Singapore")
    ticks = world.schedules.next("steady", 3)
    assert [b - a for a, b in pairwise(ticks)] == [DAY, DAY]
    assert world.schedules.get("steady").next(world.now) == ticks[0]
    world.tick(ticks[1] - world.now)
    world.now = START  # back again: what was decided does not come again
    assert world.schedules.next("steady", 1) == [ticks[2]]
    assert world.schedules.get("steady").next(world.now) == ticks[2]
    for count in (0, 101):
        with pytest.raises(InputError, match="between 1 and 100"):
            world.schedules.next("steady", count)


def test_the_shape_is_the_documented_one(world: World) -> None:
    world.add(cron="0 2 * * *", tz="Asia/Singapore")
    world.tick(DAY)
    blocks = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs" / "http-api.md").read_text(), flags=re.S | re.M)
    (documented,) = (found for found in map(json.loads, blocks) if "cron" in found)
    shown = world.schedules.as_json(world.schedules.get("steady"))
    assert shown.keys() == documented.keys()
    assert shown["ticks"][0].keys() == documented["ticks"][0].keys()
    assert shown["english"] == documented["english"]
    assert json.loads(json.dumps(shown)) == shown


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": "Nightly"}, InputError, "invalid schedule name"),
        ({"name": ""}, InputError, "invalid schedule name"),
        ({"name": "a/b"}, InputError, "invalid schedule name"),
        ({"name": "taken"}, ConflictError, "already"),
        ({"every": "90s"}, InputError, "not an interval"),
        ({"cron": "0 2 * * *"}, InputError, "both cron and every"),
        ({"every": None}, InputError, "neither cron nor every"),
        ({"tz": "Singapur"}, InputError, "unknown time zone"),
        ({"recipe": "name: x\nsteps: {corpse: {}}"}, RecipeError, "unknown step 'corpse'"),
        ({"set": ["corpus.sauces=1"]}, RecipeError, "unknown field"),
        ({"folder": "nowhere"}, InputError, "not an absolute path"),
    ],
)
def test_an_invalid_schedule_changes_nothing(
    world: World, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    world.add("taken")
    before = list(world.database.read().iterdump())
    asked = {"recipe": RECIPE, "folder": str(world.folder), "name": "new", "every": "1h"} | fields
    with pytest.raises(error, match=re.escape(message)):
        world.schedules.add(NewSchedule.model_validate(asked))
    assert list(world.database.read().iterdump()) == before


def test_an_unknown_name_is_answered_with_the_nearest(world: World) -> None:
    world.add("nightly")
    for method in ("get", "next", "pause", "resume", "remove"):
        with pytest.raises(NotFoundError) as caught:
            getattr(world.schedules, method)("nighty")
        assert caught.value.hint == "did you mean 'nightly'?"


# -------------------------------------------------------------------------------------- kills, threads, histories


def ticked_and_killed(folder: Path, now: float, statement: int) -> bool:
    """Ticks in a process that is killed (SIGKILL) just before its n-th statement on the database; False if it lived."""
    child = os.fork()
    if child == 0:
        world = World(folder, now)
        left = statement

        def count(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        world.database._writer.set_trace_callback(count)
        world.tick()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """What the suite has imported by now need not be looked through at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.heavy  # a process for every statement
@pytest.mark.usefixtures("quick_collections")
def test_a_kill_at_any_statement_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Missed ticks, one that catches up, one that finds it at work, one that is queued: all kinds in one call."""
    start = World(tmp_path)
    start.add(every="1m", catchup="last")
    start.add("other", overlap="queue", every="2m")
    start.database.close()
    pristine = (tmp_path / "moray.db").read_bytes()
    del start
    gc.collect()  # no connection is carried across the fork
    now, killed = START + 4 * MINUTE + 1, 0
    while True:
        for file in tmp_path.glob("moray.db*"):
            file.unlink()
        (tmp_path / "moray.db").write_bytes(pristine)
        if not ticked_and_killed(tmp_path, now, killed):
            break
        world = World(tmp_path, now)
        assert_sound(world)
        world.tick()
        assert_sound(world)
        found = {s.name: [(t.tick - START, t.count, t.outcome) for t in s.ticks] for s in everything(world)}
        assert found == {
            "steady": [(240, 1, "skipped"), (180, 1, "run"), (60, 2, "skipped")],
            "other": [(240, 1, "run"), (120, 1, "skipped")],
        }
        queued = world.rows("SELECT id, count(*) AS n FROM transitions WHERE kind = 'job' GROUP BY id")
        assert [row["n"] for row in queued] == [1, 1]
        world.database.close()
        del world
        gc.collect()
        killed += 1
    assert killed > 30


def everything(world: World) -> list[Schedule]:
    return [world.schedules.get(schedule.name) for schedule in world.schedules.list()]


@pytest.mark.parametrize("databases", [1, 2])
def test_two_that_tick_at_once_decide_once(world: World, databases: int) -> None:
    world.add(every="1m", overlap="allow")
    world.add("other", every="1m", overlap="skip", catchup="last")
    rival = Database(world.folder / "moray.db") if databases == 2 else world.database
    both = [world.schedules, Schedules(rival, Jobs(rival))]
    for _ in range(20):
        world.now += MINUTE
        barrier = threading.Barrier(2)
        failed: list[BaseException] = []

        def tick(schedules: Schedules, barrier: threading.Barrier = barrier, failed: list[Any] = failed) -> None:
            barrier.wait()
            try:
                schedules.tick(world.now)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=tick, args=(schedules,)) for schedules in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
    assert [row["outcome"] for row in world.rows() if row["schedule"] == "steady"] == ["run"] * 20
    assert len(world.jobs.list(schedule="other")) == 1
    assert_sound(world)


ACTIONS = st.one_of(
    st.tuples(st.just("wait"), st.floats(0, 3 * HOUR)),
    st.tuples(st.just("jump"), st.floats(-DAY, DAY)),
    st.tuples(st.sampled_from(["tick", "tick", "pause", "resume", "end", "restart", "again"]), st.just(0.0)),
)


@settings(max_examples=examples(40), deadline=None)
@given(
    trigger=st.sampled_from([{"every": "30m"}, {"cron": "*/20 * * * *", "tz": "America/New_York"}]),
    overlap=st.sampled_from(["skip", "queue", "allow"]),
    catchup=st.sampled_from(["none", "last"]),
    actions=st.lists(ACTIONS, max_size=20),
)
def test_any_history_leaves_each_tick_with_one_outcome(
    trigger: dict[str, str], overlap: str, catchup: str, actions: list[tuple[str, float]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.add(**trigger, overlap=overlap, catchup=catchup)
        cursor = world.schedules.get("steady").cursor
        for action, seconds in actions:
            act(world, action, seconds)
            assert world.schedules.get("steady").cursor >= cursor
            cursor = world.schedules.get("steady").cursor
            assert_sound(world)
        world.tick()
        assert_sound(world)
        world.database.close()


def act(world: World, action: str, seconds: float) -> None:
    world.now += seconds
    paused = world.schedules.get("steady").paused
    if action in {"wait", "tick"}:
        world.tick()
    elif action == "again":
        world.schedules.tick(world.now)
        world.schedules.tick(world.now)
    elif action == "end":
        world.end_jobs()
    elif action == "pause" and not paused:
        world.schedules.pause("steady")
    elif action == "resume" and paused:
        world.schedules.resume("steady")
    elif action == "restart":
        world.database.close()
        world.open()
