"""dedup-semantic: pairs and clusters by their definition; a real sentence transformer on paraphrases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moray.pipelines.dedup.semantic import step as semantic_step
from moray.pipelines.dedup.semantic.embedder import vectors_of
from moray.pipelines.dedup.semantic.pairs import clusters_of, similar_pairs
from moray.pipelines.dedup.semantic.step import DedupSemanticConfig
from moray.platform.core.errors import RecipeError
from tests.pipelines.step_runs import Interrupted, Page, run_in_process

TEXTS = {
    "cat": "The cat sat on the mat and watched the birds outside the window.",
    "cat-again": "A cat was sitting on the mat, watching birds outside of the window.",
    "tax": "Income tax returns must be filed before the end of April each year.",
    "tax-again": "Each year, income tax returns have to be filed before April ends.",
    "orbit": "The probe entered orbit around Saturn after a journey of seven years.",
    "copy": "The probe entered orbit around Saturn after a journey of seven years.",
}


def unit_vectors(count: int, seed: int) -> np.ndarray:
    """Around a few directions, so that some pairs are similar."""
    generator = np.random.default_rng(seed)
    vectors = (
        generator.normal(size=(20, 24))[generator.integers(0, 20, count)] + generator.normal(size=(count, 24)) * 0.3
    )
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 7, 1500])
def test_pairs_are_those_of_the_definition(count: int) -> None:
    vectors = unit_vectors(count, 1)
    labels = np.random.default_rng(2).integers(0, 3, count)
    pairs, scores = similar_pairs(vectors, labels, 0.9)
    cosines = vectors @ vectors.T
    expected = (labels[:, None] == labels[None]) & (cosines >= 0.9) & np.triu(np.ones((count, count), bool), 1)
    assert sorted(map(tuple, pairs.tolist())) == sorted(map(tuple, np.argwhere(expected).tolist()))
    assert scores == pytest.approx(cosines[pairs[:, 0], pairs[:, 1]], abs=1e-5)


def test_clusters_keep_similar_vectors_together() -> None:
    vectors = unit_vectors(1500, 3)
    labels = clusters_of(vectors, 8, 1)
    assert len(set(labels.tolist())) > 4
    assert (labels == clusters_of(vectors, 8, 1)).all()
    every, _ = similar_pairs(vectors, np.zeros(1500, np.int64), 0.9)
    within, _ = similar_pairs(vectors, labels, 0.9)
    assert len(within) > 0.9 * len(every) > 1000
    assert not clusters_of(vectors[:100], 0, 1).any(), "few documents are all compared"


@pytest.mark.heavy  # loading the model takes ten seconds
def test_one_of_several_semantic_duplicates_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Page(text, key) for key, text in TEXTS.items()]
    ids = {page.key: page.id for page in pages}
    config = DedupSemanticConfig(similarity=0.85)
    done = run_in_process(semantic_step, config, tmp_path / "2", pages, 2, monkeypatch)
    removed = {row["id"]: row for row in done.rows("removed")}
    kept = {key for key, name in ids.items() if name in done.kept()}
    assert kept in ({"cat-again", "tax", "orbit"}, {"cat-again", "tax", "copy"})
    assert removed[ids["cat"]]["reason"] == "semantic"
    assert removed[ids["cat"]]["representative"] == ids["cat-again"], "the longer one is kept"
    assert 0.85 <= removed[ids["cat"]]["similarity"] < 1
    assert done.counts["dropped:exact"] == 1
    with pytest.raises(Interrupted):
        run_in_process(semantic_step, config, tmp_path / "3", pages, 3, monkeypatch, 2)
    again = run_in_process(semantic_step, config, tmp_path / "3", pages, 3, monkeypatch)
    assert again.kept() == done.kept(), "on fewer documents a shard, after an interruption"
    vectors = vectors_of(again.tables["embeddings-00000.parquet"])
    assert vectors.shape == (2, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_a_missing_model_is_an_error_with_a_hint(tmp_path: Path) -> None:
    step = semantic_step.step
    with pytest.raises(RecipeError, match="'no_such_model' is not installed") as error:
        step.check(DedupSemanticConfig(package="no_such_model"), {})
    assert "pip install 'moray[semantic]'" in error.value.hint
    with pytest.raises(RecipeError, match="contains no model"):
        step.check(DedupSemanticConfig(model=tmp_path), {})
    with pytest.raises(RecipeError, match="contains no sentence transformer"):
        step.check(DedupSemanticConfig(package="json"), {})
    files = {file.key for file in step.external(DedupSemanticConfig())}
    assert {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"} <= files
