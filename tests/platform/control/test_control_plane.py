"""The control plane as people use it: the commands, MLflow's page, a recipe that trains; on the shared `moray up`."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import pytest

from moray.platform.control.auth import read_token
from tests.control_plane import ControlPlane
from tests.small_run import recipe_text, write_text


def test_submit_follow_list_status_why(plane: ControlPlane) -> None:
    recipe = plane.gates / "followed.yaml"
    recipe.write_text(plane.recipe("followed"))
    plane.open("followed")
    done = plane.cli("submit", "followed.yaml", "-f", "--name", "by hand", "--priority", "production")
    job = done.stdout.splitlines()[0]
    assert "the gate is open" in done.stdout
    assert f"{job}  succeeded" in done.stderr
    listed = {found["id"]: found for found in json.loads(plane.cli("list", "--json", "--limit", "1000").stdout)}
    assert (listed[job]["name"], listed[job]["priority"]) == ("by hand", "production")
    assert "succeeded" in plane.cli("status", job[-6:]).stdout
    assert "the job succeeded" in plane.cli("why", job).stdout
    overview = plane.cli("status").stdout
    for name in ("supervisor", "controller", "ray-head", "ray-worker", "mlflow"):
        assert name in overview


def test_a_failed_job_is_the_exit_code_of_following_it(plane: ControlPlane) -> None:
    plane.open("fails")
    (plane.gates / "fails.yaml").write_text(plane.recipe("fails", fail=9))
    done = plane.cli("submit", "fails.yaml", "--follow", code=1)
    assert "the gate fails as it was asked to" in done.stdout
    assert "failed" in done.stderr


def test_up_again_changes_nothing_and_another_size_is_refused(plane: ControlPlane) -> None:
    before = {name: plane.service(name) for name in ("controller", "ray-head")}
    assert "already running" in plane.cli("up").stderr
    refused = plane.cli("up", "--slots", "7", code=2)
    assert "already running with --slots 2" in refused.stderr
    assert "moray down" in refused.stderr
    assert {name: plane.service(name) for name in before} == before


def test_mlflow_is_behind_the_token(plane: ControlPlane) -> None:
    url = f"{plane.client.url}/mlflow/ajax-api/2.0/mlflow/experiments/search?max_results=5"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=30)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {read_token(plane.home)}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.loads(answer.read())
    assert found["experiments"][0]["name"] == "Default"
    assert plane.client.get("/mlflow/api/2.0/mlflow/experiments/search", max_results=5) == found


def test_a_recipe_that_trains_and_serves_runs_as_a_job(plane: ControlPlane) -> None:
    folder = plane.gates / "text"
    folder.mkdir()
    write_text(folder)
    job = plane.submit(recipe_text(folder))
    ended = plane.wait(job, "succeeded", seconds=400)
    assert len(ended["attempts"]) == 1
    view = plane.client.get(f"/api/jobs/{job['id']}/run")
    assert {step["state"] for step in view["steps"]} == {"succeeded"}
    assert len(view["curves"]["train_loss"]) > 1
    again = plane.submit(recipe_text(folder))
    plane.wait(again, "succeeded")
    states = {step["state"] for step in plane.client.get(f"/api/jobs/{again['id']}/run")["steps"]}
    assert states == {"reused"}


def test_a_schedule_ticks_and_its_jobs_carry_it(plane: ControlPlane) -> None:
    plane.open("scheduled")
    (plane.gates / "scheduled.yaml").write_text(plane.recipe("scheduled"))
    plane.cli("schedule", "add", "soon", "scheduled.yaml", "--every", "1m")
    assert "soon" in plane.cli("schedule", "list").stdout
    plane.set_clock(61.0)
    try:
        jobs = []
        deadline = time.monotonic() + 90
        while not jobs:
            assert time.monotonic() < deadline, "the schedule did not tick"
            jobs = [job for job in plane.client.get("/api/jobs") if job["schedule"] == "soon"]
        plane.wait(jobs[0], "succeeded")
    finally:
        plane.set_clock(0.0)
    plane.cli("schedule", "rm", "soon")
    assert plane.client.get(f"/api/jobs/{jobs[0]['id']}")["schedule"] == "soon", "its jobs stay"
