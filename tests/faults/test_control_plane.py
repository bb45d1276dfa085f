"""The control plane under faults: whatever dies, every accepted job ends exactly once, and no tick runs twice."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from moray.platform.control.options import NAMES
from moray.platform.core.processes import kill
from tests.control_plane import ControlPlane, wait_for


@pytest.mark.plane
@pytest.mark.parametrize("victim", NAMES)
def test_a_killed_service_loses_no_job(plane: ControlPlane, victim: str) -> None:
    keys = [f"{victim}-{i}" for i in range(3)]
    jobs = [plane.submit(plane.recipe(key, ray=i == 0), name=key) for i, key in enumerate(keys)]
    for key in keys[:2]:
        plane.begun(key)
    old = plane.kill_service(victim)
    plane.replaced(victim, old)
    for key in keys:
        plane.open(key)
    tries = [len(plane.wait(job, "succeeded")["attempts"]) for job in jobs]
    if victim != "ray-worker":  # where the drivers are
        assert tries == [1, 1, 1], "a driver was lost with a service that it does not need"
    plane.prove([job["id"] for job in jobs])


@pytest.mark.plane
def test_a_killed_driver_is_tried_again_and_its_loss_is_recorded(plane: ControlPlane) -> None:
    job = plane.submit(plane.recipe("driver"))
    kill([plane.begun("driver")])
    plane.begun("driver", times=2)
    plane.open("driver")
    ended = plane.wait(job, "succeeded")
    assert [attempt["state"] for attempt in ended["attempts"]] == ["lost", "succeeded"]
    plane.prove([job["id"]])


@pytest.mark.plane
def test_a_killed_supervisor_leaves_everything_alive_and_up_adopts_it(plane: ControlPlane) -> None:
    job = plane.submit(plane.recipe("supervisor"))
    driver = plane.begun("supervisor")
    before = {name: plane.service(name) for name in NAMES}
    kill([plane.service("supervisor")])
    plane.cli("up")
    assert {name: plane.service(name) for name in NAMES} == before
    assert driver.alive()
    plane.open("supervisor")
    ended = plane.wait(job, "succeeded")
    assert len(ended["attempts"]) == 1


@pytest.mark.plane
def test_the_same_submission_twice_is_one_job(plane: ControlPlane) -> None:
    source = plane.recipe("twice")
    first, second = plane.submit(source, key="once"), plane.submit(source, key="once")
    assert first["id"] == second["id"]
    plane.open("twice")
    plane.wait(first, "succeeded")


@pytest.mark.plane
def test_a_failing_job_uses_its_retries_and_a_mistaken_one_does_not(plane: ControlPlane) -> None:
    plane.open("flaky")
    flaky = plane.submit(plane.recipe("flaky", fail=1), retries=1)
    plane.open("broken")
    broken = plane.submit(plane.recipe("broken", fail=9))
    assert [a["state"] for a in plane.wait(flaky, "succeeded")["attempts"]] == ["failed", "succeeded"]
    ended = plane.wait(broken, "failed")
    assert len(ended["attempts"]) == 1
    assert "the gate fails as it was asked to" in ended["reason"]


@pytest.mark.plane
def test_stop_ends_a_running_job_and_a_waiting_one(plane: ControlPlane) -> None:
    running = plane.submit(plane.recipe("stopped"))
    driver = plane.begun("stopped")
    others = [plane.submit(plane.recipe(f"fill-{i}")) for i in range(2)]
    plane.cli("stop", others[1]["id"])
    plane.cli("stop", running["id"])
    plane.wait(running, "cancelled")
    wait_for(lambda: not driver.alive(), "the stopped driver's end")
    assert plane.job(others[1])["state"] == "cancelled"
    plane.open("fill-0")
    plane.wait(others[0], "succeeded")
    plane.prove([job["id"] for job in (running, *others)])


@pytest.mark.plane
def test_a_clock_that_jumps_neither_repeats_a_tick_nor_loses_one(plane: ControlPlane) -> None:
    plane.open("ticking")
    body = {"recipe": plane.recipe("ticking"), "folder": str(plane.gates), "name": "ticking", "every": "1m"}
    made = plane.client.post("/api/schedules", body | {"overlap": "allow"})

    def ticks() -> list[tuple[float, float, int, str]]:
        query = "SELECT tick, until, count, outcome FROM ticks WHERE schedule = 'ticking' ORDER BY tick"
        return [tuple(row) for row in plane.rows(query)]

    jumps = [65.0, 130.0, 3730.0, 3600.0, 0.0, 3800.0]  # a minute twice, an hour, back by two minutes, by an hour, on
    for number, jump in enumerate(jumps):
        plane.set_clock(jump)
        due = made["created"] + 60 * ((jump + time.time() - made["created"]) // 60)
        wait_for(lambda due=due: (found := ticks()) and found[-1][1] >= due - 1, f"the tick after jump {number}")
    plane.client.delete("/api/schedules/ticking")
    plane.set_clock(0.0)
    decided = ticks()
    covered = sum(count for _, _, count, _ in decided)
    assert covered == round((decided[-1][1] - made["created"]) / 60), "each tick is decided once, none is left out"
    assert all(later[0] > earlier[1] for earlier, later in itertools.pairwise(decided)), decided
    assert [outcome for *_, outcome in decided].count("run") >= 3
    jobs = [row["id"] for row in plane.rows("SELECT id FROM jobs WHERE schedule = 'ticking'")]
    for job in jobs:
        plane.wait({"id": job}, "succeeded")
    plane.prove(jobs)


@pytest.mark.plane
def test_down_keeps_logs_and_events_and_up_resumes_the_queue(tmp_path: Path) -> None:
    plane = ControlPlane(tmp_path)
    plane.up()
    job = plane.submit(plane.recipe("kept"))
    plane.open("kept")
    plane.wait(job, "succeeded")
    shown = plane.cli("logs", job["id"]).stdout
    working, waiting = (plane.submit(plane.recipe(key)) for key in ("working", "waiting"))
    driver = plane.begun("working")
    plane.down()
    assert not driver.alive()
    assert plane.processes() == []
    assert "the gate is open" in shown
    run = plane.home.runs / f"{job['id']}.1"
    assert (run / "logs" / "driver.txt").read_text() == shown
    assert "succeeded" in plane.cli("runs", "show", job["id"]).stdout
    plane.open()
    plane.up()
    assert [a["state"] for a in plane.wait(working, "succeeded")["attempts"]] == ["lost", "succeeded"]
    plane.wait(waiting, "succeeded")
    plane.prove([job["id"], working["id"], waiting["id"]])
    plane.down()
