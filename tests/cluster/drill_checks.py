"""What a drill has to show: the artifacts of one machine, to the bit, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from moray.cluster.drills.hosts import reason_against
from moray.cluster.drills.ray_cluster import WORK, RayDrill, fetches, object_store_contains
from moray.cluster.drills.scenarios import differing_files, stored_manifests, unnamed_files
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.manifest import Manifest
from moray.platform.store.search import local_artifacts
from tests.checkout import ROOT
from tests.conftest import Flow
from tests.small_run import STEPS, recipe_text, write_text

# Files that hold times, random ids or addresses.
_VARYING = {
    "pretrain": {".metadata", "checksums.json"},
    "register": {"registration.json"},
    # Programs of reasoning-gym that draw random numbers without a seed, on one machine too.
    "synthesize": {"documents-00009.parquet", "rejected-00009.parquet", "rejected-00010.parquet"},
    "smoke-serve": {"transcript.json"},
}


def need_hosts() -> None:
    """Skips a test on a machine that cannot have hosts of its own."""
    if reason := reason_against():
        pytest.skip(reason)


def prepare(drill: RayDrill, until: str) -> str:
    """Puts the small recipe and its text on the laptop; returns the recipe's path there."""
    write_text(drill.work)
    return write_recipe(drill, recipe_text(Path(WORK), until))


def write_recipe(drill: RayDrill, text: str) -> str:
    """Puts a recipe on the laptop; returns its path there."""
    (drill.work / "recipe.yaml").write_text(text)
    return f"{WORK}/recipe.yaml"


def until(step: str) -> list[str]:
    """The steps of the small recipe up to this one."""
    return STEPS[: STEPS.index(step) + 1]


def of_flow(flow: Flow, step: str) -> dict[str, Manifest]:
    """The artifacts of the small recipe on one machine, up to this step."""
    return {name: flow.artifact(name).manifest for name in until(step)}


def run_on_one_machine(folder: Path, recipe: str, cpus: int = 2) -> dict[str, Manifest]:
    """Runs a recipe on this machine, from the checkout, and returns its artifacts by step. folder: an empty one."""
    home = Home(folder / "home")
    home.root.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    command = [sys.executable, str(ROOT / "moray.py"), "run", str(folder / "recipe.yaml"), "--cpus", str(cpus)]
    variables = {**os.environ, "MORAY_HOME": str(home.root), "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {artifact.manifest.step: artifact.manifest for artifact in local_artifacts(ArtifactStore(home))}


def prove(drill: RayDrill, expected: Mapping[str, Manifest]) -> None:
    """Every artifact is complete, is the one of a single machine, and nothing else is left."""
    found = stored_manifests(drill)
    assert set(found) == set(expected)
    for step, manifest in expected.items():
        check_same(found[step], manifest)
    assert not unnamed_files(drill)


def check_same(made: Manifest, expected: Manifest) -> None:
    """Two artifacts have the same fingerprint and files, except those with times and random ids."""
    assert (made.step, made.fingerprint) == (expected.step, expected.fingerprint)
    differing = {Path(path).name for path in differing_files(made, expected)}
    unexpected = differing - _VARYING.get(made.step, set())
    assert not unexpected, f"{made.step}: {sorted(unexpected)} differ"


def check_fetches(drill: RayDrill) -> None:
    """No host downloaded an artifact's file twice. The small records of finished tasks are no part of an artifact."""
    named = {
        f"{manifest.fingerprint}/{manifest.objects}/{file.path}"
        for manifest in stored_manifests(drill).values()
        for file in manifest.files
    }
    twice = {
        (host, key): count
        for (host, key), count in fetches(drill).items()
        if count > 1 and any(key.endswith(name) for name in named)
    }
    assert not twice, str(twice)


def check_object_store(drill: RayDrill) -> None:
    """No text of the small recipe's code is, or was, in the object store of a node."""
    folder = drill.work / "code"
    texts = [path.read_bytes()[200:264] for path in sorted(folder.rglob("*.py")) if path.stat().st_size > 1000]
    assert len(texts) > 30
    assert [object_store_contains(host.pids(), texts) for host in drill.nodes] == [[] for _ in drill.nodes]
