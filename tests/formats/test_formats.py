"""What earlier versions wrote is found and read: addresses of shipped recipes, artifacts, indexes, checkpoints.

home.tar.xz is the home after a run of recipe.yaml by commit 24257ba; texts.jsonl is the corpus of that run. A change
that fails here makes everybody's artifacts run anew: it must raise a step's version, and say so in the CHANGELOG.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moray.cluster.embedded import EmbeddedCluster
from moray.pipelines.dedup import dedup_index
from moray.pipelines.pretrain.checkpoint.training_state import TrainingState
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.step import read_model_config
from moray.pipelines.pretrain.worker import build
from moray.pipelines.shared.documents import content_hash, read_shard, shard_paths
from moray.platform.api import RECIPES, open_recipe
from moray.platform.core.home import Home
from moray.platform.plan.fingerprint import addresses
from moray.platform.plan.recipe import Recipe, parse_recipe
from moray.platform.plan.step import Step
from moray.platform.run.runner import Runner, plan_steps
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import find_artifact, newest_artifact

HERE = Path(__file__).parent
# The fingerprint of each step of each shipped recipe, with external files left out: those are a machine's own.
FINGERPRINTS = json.loads((HERE / "fingerprints.json").read_text())
# SHA-256 of model.safetensors
EXPORTED = "b32ccd59518cc70b29e1453f6c533df2a99dd1e7fe1b836c6ff8fc87f32e8b96"
# SHA-256 of what a worker holds after it has read the checkpoint
TRAINING_STATE = "4c86ef077474193f22a787fa497746c02cb1fb268f481322707251e715f5c6fe"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("formats")
    with tarfile.open(HERE / "home.tar.xz") as packed:
        packed.extractall(root, filter="data")
    return Home(root)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe((HERE / "recipe.yaml").read_text().replace("{here}", str(HERE)), Path("formats.yaml"), ())


def artifact(home: Home, step: str) -> Artifact:
    found = newest_artifact(ArtifactStore(home), step)
    assert found is not None
    return found


@pytest.mark.usefixtures("built_corpus")
@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_have_the_fingerprints_that_they_had(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = open_recipe(name)
    for planned in recipe.steps:
        monkeypatch.setattr(type(planned.step), "external", Step.external)
    assert {key: address.fingerprint for key, address in addresses(recipe).items()} == FINGERPRINTS[name]


def test_a_run_reuses_every_artifact(home: Home, recipe: Recipe) -> None:
    decisions = plan_steps(recipe, ArtifactStore(home), EmbeddedCluster(home).topology())
    assert [(one.planned.key, one.why) for one in decisions if not one.reuse] == []


def test_a_model_is_exported_from_the_checkpoint_to_the_same_bits(home: Home, recipe: Recipe) -> None:
    shutil.rmtree(artifact(home, "export").folder)
    made = Runner(home, EmbeddedCluster(home), []).run(recipe).steps
    assert [key for key, step in made.items() if not step.reused] == ["export"]
    weights = (made["export"].artifact.folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == EXPORTED


def test_training_resumes_from_the_checkpoint(home: Home, recipe: Recipe) -> None:
    folder = artifact(home, "pretrain").folder
    (planned,) = [one for one in recipe.steps if one.key == "pretrain"]
    job = TrainingJob(planned.config, read_model_config(folder), 32, str(folder), "", "pretrain", threads=1)
    worker = build(job, Mesh.alone(), torch.device("cpu"))
    restored = worker.checkpoints.restore(worker.state)
    assert (restored.steps, restored.tokens, restored.warnings) == (4, 512, ())
    digest = hashlib.sha256()
    for name, value in sorted(tensors(worker.state), key=itemgetter(0)):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == TRAINING_STATE


def tensors(state: TrainingState) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, biases, masters, moments, the moving average and the guard's losses."""
    yield from ((name, view.detach()) for name, view, _ in state.model.logical_parameters())
    yield from state.shared()
    yield from ((f"{part.kind}/{part.name}@{part.offset}", part.tensor) for part in state.fragments())


def test_an_index_of_dedup_knows_its_documents(home: Home) -> None:
    folder = artifact(home, "dedup").folder
    generation = dedup_index.Generation.read(folder)
    texts = find_artifact(ArtifactStore(home), generation.documents).folder
    earlier = [dedup_index.Earlier(generation, folder, texts)]
    rows = [text for path in shard_paths(texts) for text in read_shard(path)["text"].to_pylist()]
    hashes = np.array([content_hash(text).encode() for text in rows])
    found = dedup_index.find_hashes(earlier, hashes).tolist()
    assert [rows[number] for number in found] == rows
    representatives = pq.read_table(folder / "index" / "representatives.parquet")
    assert dedup_index.Representatives.read(earlier).documents.tolist() == representatives["document"].to_pylist()
