"""A host that is lost in each step, Ray's head, the controller, the laptop: the result is that of one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from moray.cluster.drills.ray_cluster import ray_drill
from moray.cluster.drills.scenarios import (
    Fault,
    Happening,
    drawn_faults,
    lose_controller,
    lose_head,
    lose_head_and_state,
    lose_laptop,
    run_recipe,
    submit_recipe,
)
from tests.checkout import ROOT
from tests.cluster.drill_checks import need_hosts, of_flow, prepare, prove
from tests.conftest import Flow
from tests.small_run import STEPS

pytestmark = [pytest.mark.ray, pytest.mark.evidence]


@pytest.fixture(autouse=True)
def hosts() -> None:
    need_hosts()


@pytest.mark.parametrize("seed", [1, 2])  # 1 takes the host of the driver, 2 another one
@pytest.mark.parametrize("step", STEPS)
def test_a_host_lost_in_any_step(tmp_path: Path, flow: Flow, step: str, seed: int) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        assert run_recipe(drill, prepare(drill, step), list(drawn_faults([step], seed))) == 0
        prove(drill, of_flow(flow, step))


@pytest.mark.parametrize("step", STEPS)
def test_the_head_lost(tmp_path: Path, flow: Flow, step: str) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        assert run_recipe(drill, prepare(drill, step), [Fault(step, 1.0, lose_head)]) == 0
        prove(drill, of_flow(flow, step))


@pytest.mark.parametrize("act", [lose_laptop, lose_controller, lose_head_and_state])
def test_a_submitted_job_ends_once(tmp_path: Path, flow: Flow, act: Happening) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        job = submit_recipe(drill, prepare(drill, "dedup"), [Fault("dedup", 0.5, act)])
        assert job["state"] == "succeeded"
        states = [attempt["state"] for attempt in job["attempts"]]
        # The driver outlives the control plane, but not a head that forgets it.
        assert states == (["lost", "succeeded"] if act is lose_head_and_state else ["succeeded"])
        prove(drill, of_flow(flow, "dedup"))
