"""Hosts of our own that share nothing: a recipe that is run from a laptop gives the same files as on one machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from moray.cluster.drills.hosts import reason_against
from moray.cluster.drills.ray_cluster import RayDrill, fetches, ray_drill
from moray.cluster.drills.scenarios import (
    Fault,
    differing_files,
    drawn_faults,
    lose_head,
    lose_store,
    run_recipe,
    stored_manifests,
    unnamed_files,
)
from moray.platform.core.home import Home
from moray.platform.store.artifacts import Artifact, ArtifactStore
from tests.checkout import ROOT
from tests.conftest import Flow
from tests.small_run import STEPS, recipe_text, write_text

pytestmark = pytest.mark.ray

# Files that hold times, random ids or addresses.
_VARYING = {
    "pretrain": {".metadata", "checksums.json"},
    "register": {"registration.json"},
    "smoke-serve": {"transcript.json"},
}


@pytest.fixture(autouse=True)
def hosts_are_possible() -> None:
    if reason := reason_against():
        pytest.skip(reason)


def prepare(drill: RayDrill, until: str) -> str:
    """Puts the recipe and its text on the laptop; returns the recipe's path there."""
    work = drill.laptop.home / "work"
    work.mkdir()
    write_text(work)
    (work / "recipe.yaml").write_text(recipe_text(Path("/mnt/work"), until))
    return "/mnt/work/recipe.yaml"


def prove(drill: RayDrill, artifact: Callable[[str], Artifact], steps: Sequence[str]) -> None:
    """Every artifact is complete, is the one of a single machine, and nothing else is left."""
    found = stored_manifests(drill)
    assert set(found) == set(steps)
    for step in steps:
        assert found[step].fingerprint == artifact(step).fingerprint
        differing = {Path(path).name for path in differing_files(found[step], artifact(step).manifest)}
        assert differing <= _VARYING.get(step, set()), step
    assert not unnamed_files(drill)


def check_fetches(drill: RayDrill) -> None:
    """No host downloaded an artifact's file twice."""
    twice = {where: count for where, count in fetches(drill).items() if count > 1 and "/w-" in where[1]}
    assert not twice


def test_a_lost_host_changes_nothing_in_the_result(tmp_path: Path, flow: Flow) -> None:
    steps = ["corpus", "filter"]
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        recipe = prepare(drill, steps[-1])
        assert run_recipe(drill, recipe, list(drawn_faults(["filter"], 2))) == 0
        prove(drill, flow.artifact, steps)
        # A recipe that names a path of one host as one of all hosts must fail: the hosts share nothing.
        text = (drill.laptop.home / "work" / "recipe.yaml").read_text()
        shared = text.replace('path: "/mnt/work/lines"', 'path: "host:/mnt/work/lines"')
        (drill.laptop.home / "work" / "shared.yaml").write_text(shared)
        done = subprocess.run(
            drill.moray("run", "/mnt/work/shared.yaml", "--cluster", "drill"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "/mnt/work/lines does not exist" in done.stdout


@pytest.mark.evidence
def test_the_whole_flow_on_separate_hosts(tmp_path: Path, flow: Flow) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT, rate="1gbit") as drill:
        assert run_recipe(drill, prepare(drill, "smoke-serve")) == 0
        prove(drill, flow.artifact, STEPS)
        check_fetches(drill)


@pytest.mark.evidence
@pytest.mark.parametrize("step", STEPS)
def test_a_host_lost_in_any_step(tmp_path: Path, flow: Flow, step: str) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        assert run_recipe(drill, prepare(drill, step), list(drawn_faults([step], STEPS.index(step)))) == 0
        prove(drill, flow.artifact, STEPS[: STEPS.index(step) + 1])


@pytest.mark.evidence
@pytest.mark.parametrize("step", ["corpus", "dedup", "pretrain"])
def test_the_head_lost(tmp_path: Path, flow: Flow, step: str) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        assert run_recipe(drill, prepare(drill, step), [Fault(step, 1.0, lose_head)]) == 0
        prove(drill, flow.artifact, STEPS[: STEPS.index(step) + 1])


@pytest.mark.evidence
def test_the_store_away_for_a_minute(tmp_path: Path, flow: Flow) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        away = [Fault("dedup", 0.5, lambda drill, say: lose_store(drill, say, 60.0))]
        assert run_recipe(drill, prepare(drill, "dedup"), away) == 0
        prove(drill, flow.artifact, STEPS[: STEPS.index("dedup") + 1])


@pytest.mark.evidence
def test_a_folder_that_all_hosts_see_is_a_store(tmp_path: Path, flow: Flow) -> None:
    steps = STEPS[: STEPS.index("pretrain") + 1]
    with ray_drill(tmp_path / "drill", 2, ROOT, with_shared_folder=True) as drill:
        assert run_recipe(drill, prepare(drill, steps[-1]), list(drawn_faults(["dedup"], 5))) == 0
        assert drill.shared
        home = Home(drill.shared.parent, str(drill.shared))
        for step in steps:
            made = ArtifactStore(home).get(step, flow.artifact(step).fingerprint)
            assert made
            differing = {Path(path).name for path in differing_files(made.manifest, flow.artifact(step).manifest)}
            assert differing <= _VARYING.get(step, set()), step
