"""Pretokenized sources in recipes: mistakes, fingerprints, buckets, and training on them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from moray.pipelines.evaluate.eval_report import EvalReport
from moray.pipelines.tokenize.pretokenized.segments import file_segments, source_candidates
from moray.pipelines.tokenize.pretokenized.source import PretokenizedSource
from moray.pipelines.tokenize.pretokenized.sources import external_files
from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import RecipeError
from moray.platform.core.events import Event, MetricEvent
from moray.platform.core.home import Home
from moray.platform.plan.fingerprint import addresses
from moray.platform.plan.recipe import Recipe, parse_recipe
from moray.platform.run.runner import Runner
from tests.checkout import ROOT
from tests.pipelines.tokenize.pretokenized.id_files import write_megatron, write_parquet_ids, write_tokenizer
from tests.s3 import BUCKET, KEYS, empty_bucket

RECIPE = """
name: ids
steps:
  tokenizer: {{uses: load-tokenizer, with: {{path: {folder}/tokenizer}}}}
  tokenize:
    inputs: {{tokenizer: tokenizer}}
    with:
      sequence_length: 32
      pretokenized:
        - {{name: web, format: megatron, path: {folder}/web, heldout: 0.1}}
        - {{name: books, format: huggingface, path: {folder}/books, heldout: 0.1}}
  pretrain:
    inputs: {{tokens: tokenize}}
    with:
      steps: 2
      batch_sequences: 4
      mixture: {{web: 3, books: 1}}
      model: {{preset: tiny, hidden_size: 32, intermediate_size: 64, moe_intermediate_size: 16, num_hidden_layers: 2,
              kv_lora_rank: 16, q_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    write_megatron(tmp_path / "web" / "a", [[[n % 200 + 10] * (n % 9 + 3)] for n in range(80)])
    write_parquet_ids(tmp_path / "books" / "a.parquet", [[n % 200 + 10] * 5 for n in range(80)])
    return tmp_path


def parsed(folder: Path, *overrides: str) -> Recipe:
    return parse_recipe(RECIPE.format(folder=folder), Path("ids.yaml"), overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenize.pretokenized=[]", "nothing to tokenize"),
        ("tokenize.fim_rate=0.1", "fim_rate needs the input `documents`"),
        ("tokenize.pretokenized.1.name=web", "pretokenized: duplicate name 'web'"),
        (
            "tokenize.pretokenized.0.include=['b*']",
            r"pretokenized\.0: source 'web': no pair PREFIX\.idx and PREFIX\.bin",
        ),
        ("tokenize.pretokenized.1.split=test", r"pretokenized\.1: .*no \.parquet or \.arrow file of the split 'test'"),
        ("tokenize.pretokenized.0.split=test", "`column` and `split` need the format huggingface"),
        ("tokenize.pretokenized.0.format=megatro", "input should be 'megatron' or 'huggingface'"),
    ],
)
def test_mistakes_are_found_before_anything_starts(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parsed(folder, override)


def test_half_a_pair_is_a_mistake(folder: Path) -> None:
    (folder / "web" / "a.bin").unlink()
    with pytest.raises(RecipeError, match=r"source 'web': a\.idx has no a\.bin beside it"):
        parsed(folder)


def test_steps_over_documents_say_what_they_need(folder: Path) -> None:
    text = RECIPE.format(folder=folder) + "  split: {inputs: {documents: tokenize}}\n"
    with pytest.raises(RecipeError, match="step 'tokenize' produces tokens, but 'documents' takes documents"):
        parse_recipe(text, Path("ids.yaml"))


def test_the_fingerprint_follows_the_files(folder: Path) -> None:
    first = addresses(parsed(folder))["tokenize"].fingerprint
    (folder / "web" / "notes.txt").write_text("not read")
    os.utime(folder / "web" / "a.bin", (1, 1))
    assert addresses(parsed(folder))["tokenize"].fingerprint == first
    dated = "tokenize.pretokenized.0.compare_by=date"
    by_date = addresses(parsed(folder, dated))["tokenize"].fingerprint
    os.utime(folder / "web" / "a.bin", (2, 2))
    assert addresses(parsed(folder, dated))["tokenize"].fingerprint != by_date
    write_megatron(folder / "web" / "a", [[[5]]])
    assert addresses(parsed(folder))["tokenize"].fingerprint != first


def test_documents_and_their_fingerprints_are_as_before(folder: Path) -> None:
    """A recipe without pretokenized sources keeps its artifacts."""
    text = yaml.safe_load(RECIPE.format(folder=folder))
    corpus = {"sources": [{"name": "a", "path": str(folder / "web"), "include": ["*.idx"]}]}
    text["steps"] |= {
        "corpus": {"with": corpus},
        "split": {"inputs": {"documents": "corpus"}},
        "tokenize": {"inputs": {"documents": "split", "tokenizer": "tokenizer"}},
    }
    found = addresses(parse_recipe(yaml.safe_dump(text), Path("ids.yaml")))["tokenize"]
    assert "pretokenized" not in found.config
    assert found.external == {}


@pytest.mark.parametrize("prefix", ["", "/a"])
def test_a_bucket_is_listed_and_read(folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    client = empty_bucket(s3_url)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_url}.items():
        monkeypatch.setenv(name, value)
    for path in (folder / "web").iterdir():
        client.upload_file(str(path), BUCKET, f"ids/{path.name}")
    source = PretokenizedSource(name="web", format="megatron", url=f"s3://{BUCKET}/ids{prefix}")
    local = PretokenizedSource(name="web", format="megatron", path=folder / "web")
    assert [file.digest[:5] for file in external_files([source])] == ["etag:", "etag:"]

    def ids(one: PretokenizedSource) -> list[list[int]]:
        segments = [found for candidate in source_candidates(one) for found in file_segments(candidate, 100)]
        assert len(segments) > 1
        return [stored.ids.tolist() for segment in segments for stored in segment.read()]

    assert ids(source) == ids(local)


SMALL = (
    "tokenize.sequence_length=32",
    "pretrain.steps=2",
    "pretrain.batch_sequences=4",
    "pretrain.model={preset: tiny, hidden_size: 32, intermediate_size: 64, moe_intermediate_size: 16, "
    "num_hidden_layers: 2, kv_lora_rank: 16, q_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}",
)


def test_the_recipe_of_the_documentation_trains_on_ids_alone(tmp_path: Path, ray_cluster: Cluster) -> None:
    """Its curves reach TensorBoard from the training worker."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_tokenizer(tmp_path / "data" / "tokenizer")
    rows = [[n % 200 + 10] * (n % 9 + 3) + [1] for n in range(300)]
    for name in ("cc-0_text_document", "cc-1_text_document", "wiki_text_document"):
        write_megatron(tmp_path / "data" / "web" / name, [[row] for row in rows])
    write_parquet_ids(tmp_path / "data" / "books" / "a.parquet", rows * 2)
    page = (ROOT / "docs" / "tokenize.md").read_text()
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if block.startswith("name: ")]
    recipe = parse_recipe(
        text.replace("/data/", f"{tmp_path}/data/"), Path("ids.yaml"), (*SMALL, f"tracking.tensorboard={tmp_path}/tb")
    )
    events: list[Event] = []
    result = Runner(Home(tmp_path / "home"), ray_cluster, [events.append]).run(recipe)
    assert {event.at for event in events if isinstance(event, MetricEvent) and event.name == "train_loss"} == {1, 2}
    folder = tmp_path / "tb" / "from-ids" / f"pretrain-{result.steps['pretrain'].artifact.fingerprint[:8]}"
    curves = EventAccumulator(str(folder)).Reload()
    assert [point.step for point in curves.Scalars("train_loss")] == [1, 2]
    counts = result.steps["tokenize"].artifact.manifest.counts
    assert counts["in:documents"] == 5 * 300
    scores = EvalReport.read(result.steps["evaluate"].artifact.folder)
    assert {row.labels["model"] for row in scores.rows} == {"model", "unigram"}
    assert {row.labels["source"] for row in scores.rows} == {"web", "books", "all"}
    again = Runner(Home(tmp_path / "home"), ray_cluster).run(recipe)
    assert all(step.reused for step in again.steps.values())
