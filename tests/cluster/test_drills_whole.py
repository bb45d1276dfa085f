"""Whole recipes on hosts that share nothing, over links of 1 Gbit/s: the artifacts are those of one machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from moray.cluster.drills.ray_cluster import WORK, ray_drill
from moray.cluster.drills.scenarios import drawn_faults, run_recipe
from moray.platform.api import RECIPES
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from tests.checkout import ROOT
from tests.cluster.drill_checks import (
    check_fetches,
    check_object_store,
    check_same,
    need_hosts,
    of_flow,
    prepare,
    prove,
    run_on_one_machine,
    write_recipe,
)
from tests.conftest import Flow
from tests.small_run import recipe_text, write_text

pytestmark = [pytest.mark.ray, pytest.mark.evidence]

_FOUR_RANKS = "steps: 12\n      parallel: {workers: 4, expert_parallel: 2}"
_DOCUMENTS = "benchmarks/corpus/.cache/documents"


@pytest.fixture(autouse=True)
def hosts() -> None:
    need_hosts()


def test_the_whole_flow(tmp_path: Path, flow: Flow) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT, rate="1gbit") as drill:
        assert run_recipe(drill, prepare(drill, "smoke-serve")) == 0
        prove(drill, of_flow(flow, "smoke-serve"))
        check_fetches(drill)
        check_object_store(drill)


def test_training_on_four_hosts(tmp_path: Path) -> None:
    """EP 2 x EDP 2, one rank on each host."""
    text = tmp_path / "text"
    write_text(text)
    one = run_on_one_machine(tmp_path / "one", recipe_text(text, "export").replace("steps: 12", _FOUR_RANKS), cpus=4)
    with ray_drill(tmp_path / "drill", 4, ROOT, rate="1gbit") as drill:
        prepare(drill, "export")
        recipe = recipe_text(Path(WORK), "export").replace("steps: 12", _FOUR_RANKS)
        assert run_recipe(drill, write_recipe(drill, recipe)) == 0
        prove(drill, one)
        check_fetches(drill)


@pytest.mark.parametrize(
    ("name", "until"), [("quickstart", "tokenize"), ("synthesize-demo", "synthesize"), ("corpus-demo", "coverage")]
)
def test_text_of_recipes_that_ship(tmp_path: Path, name: str, until: str) -> None:
    if name == "corpus-demo" and not (ROOT / _DOCUMENTS).is_dir():
        pytest.skip("corpus-demo needs `make bench-corpus`")
    if name == "synthesize-demo":
        pytest.importorskip("reasoning_gym")
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    steps = list(recipe["steps"])
    recipe["steps"] = {step: recipe["steps"][step] for step in steps[: steps.index(until) + 1]}
    text = yaml.safe_dump(recipe, sort_keys=False)
    one = run_on_one_machine(tmp_path / "one", text)
    with ray_drill(tmp_path / "drill", 2, ROOT, rate="1gbit") as drill:
        if name == "corpus-demo":
            shutil.copytree(ROOT / _DOCUMENTS, drill.work / _DOCUMENTS)
        assert run_recipe(drill, write_recipe(drill, text)) == 0
        prove(drill, one)
        check_fetches(drill)


def test_a_folder_that_all_hosts_see_is_a_store(tmp_path: Path, flow: Flow) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT, with_shared_folder=True) as drill:
        assert run_recipe(drill, prepare(drill, "pretrain"), list(drawn_faults(["dedup"], 5))) == 0
        assert drill.shared
        store = ArtifactStore(Home(drill.shared.parent, str(drill.shared)))
        for step, manifest in of_flow(flow, "pretrain").items():
            made = store.get(step, manifest.fingerprint)
            assert made
            check_same(made.manifest, manifest)
