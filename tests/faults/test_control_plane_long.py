"""The long proof: a hundred submissions under random kills, and a controller that stands still."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moray.platform.control.options import NAMES
from moray.platform.core.errors import MorayError
from moray.platform.core.processes import kill
from tests.control_plane import ControlPlane, freeze, thaw

pytestmark = pytest.mark.evidence
SUBMISSIONS = 100
KILLS_EVERY = 12.0  # seconds


def test_a_hundred_submissions_under_random_kills(tmp_path: Path) -> None:
    plane = ControlPlane(tmp_path)
    plane.up("--slots", "4")
    plane.open()
    seed = time.time_ns() % 10_000
    chance, done = random.Random(seed), threading.Event()
    killed: list[str] = []
    killer = threading.Thread(target=_kill_at_random, args=(plane, chance, done, killed), daemon=True)
    killer.start()
    accepted = [_submit(plane, number) for number in range(SUBMISSIONS)]
    for job in accepted:
        plane.wait({"id": job}, "succeeded", seconds=1200)
    done.set()
    killer.join()
    plane.prove(accepted)
    attempts = plane.rows("SELECT state, count(*) AS n FROM attempts GROUP BY state")
    jobs = plane.rows("SELECT count(*) AS n FROM jobs")[0]["n"]
    print(f"\nseed {seed}: {jobs} jobs, attempts { ({row['state']: row['n'] for row in attempts}) }, killed {killed}")
    assert jobs == SUBMISSIONS, "a submission that was sent again became a second job"
    assert len(set(accepted)) == SUBMISSIONS
    plane.down()


def test_a_controller_that_stands_still_for_half_a_minute(tmp_path: Path) -> None:
    plane = ControlPlane(tmp_path)
    plane.up("--slots", "2")
    jobs = [plane.submit(plane.recipe(f"sleep-{i}"))["id"] for i in range(4)]
    first = plane.begun("sleep-0")
    plane.begun("sleep-1")
    controller = plane.service("controller")
    freeze(controller)
    plane.open("sleep-0")
    _wait_until(lambda: not first.alive())
    kill([plane.begun("sleep-1")])
    time.sleep(30)  # what is tested: nobody decides anything for so long
    thaw(controller)
    plane.open()
    for job in jobs:
        plane.wait({"id": job}, "succeeded")
    plane.prove(jobs)
    assert plane.service("controller") == controller, "standing still is no death"
    plane.down()


def _submit(plane: ControlPlane, number: int) -> str:
    """One submission, sent again with the same key until it is acknowledged, as a careful client does."""
    source, key = plane.recipe(f"job-{number}"), f"submission-{number}"
    deadline = time.monotonic() + 300
    while True:
        try:
            return str(plane.submit(source, key=key)["id"])
        except MorayError:
            assert time.monotonic() < deadline, f"submission {number} was never acknowledged"
            time.sleep(0.5)


def _kill_at_random(plane: ControlPlane, chance: random.Random, done: threading.Event, killed: list[str]) -> None:
    while not done.wait(chance.uniform(0.5, 1.5) * KILLS_EVERY):
        victim = chance.choice([*NAMES, "driver"])
        if victim == "driver":
            drivers = [p for p in plane.processes() if "moray.platform.control.driver" in p.command()]
            kill(drivers[:1])
        else:
            plane.kill_service(victim)
        killed.append(victim)


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)
