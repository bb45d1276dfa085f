"""The step: its result does not depend on the encoder, the layout of shards, or interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moray.actors.data.token_set import TokenSet, open_token_sets
from moray.pipelines.shared.documents import SCHEMA, document_id, shard_name, write_shard
from moray.pipelines.tokenize import step as tokenize
from moray.pipelines.tokenizer.train import TokenizerConfig, hugging_face_config, load_tokenizer, train_tokenizer
from moray.platform.core.errors import InputError
from moray.platform.core.events import NoteEvent, read_events
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.store.artifacts import Artifact
from tests.pipelines.step_runs import Interrupted, in_process
from tests.step_contexts import context_for, manifest_of

Texts = dict[str, list[str]]  # by source


@pytest.fixture(scope="module")
def texts() -> Texts:
    generator = np.random.default_rng(3)
    words = ["def", "return", "Himmel", "und", "Erde", "self.x", "\u4e2d\u6587", "12345", "(a,", "b)\n", "<|eos|>"]
    draws = generator.lognormal(3.5, 1.0, 300).astype(int) + 1
    made = [f"{i} " + " ".join(generator.choice(words, n).tolist()) for i, n in enumerate(draws)]
    return {"a": made[:220], "b": made[220:]}


def artifact(folder: Path, produces: str) -> Artifact:
    manifest = manifest_of(produces, "ab", produces)
    return Artifact(folder, manifest)


def write_documents(folder: Path, texts: Texts, shards: int) -> None:
    """Every tenth document is held out; `shards` of each source, one after another, and an empty one."""
    for part in ("train", "heldout"):
        parts: list[list[dict[str, Any]]] = [[]]
        for source, own in texts.items():
            rows = [
                {"id": document_id(source, str(i)), "text": text, "source": source, "license": "", "meta": []}
                for i, text in enumerate(own)
                if (i % 10 == 0) == (part == "heldout")
            ]
            parts += [rows[at : at + -(-len(rows) // shards)] for at in range(0, len(rows), -(-len(rows) // shards))]
        for number, rows in enumerate(parts):
            write_shard(folder / part / shard_name(number), pa.Table.from_pylist(rows, SCHEMA))


@pytest.fixture(scope="module")
def tokenizer(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = TokenizerConfig(vocab_size=330, fim=True)
    train_tokenizer(iter(texts["a"]), config).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    return folder


def run_step(
    folder: Path,
    texts: Texts,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int = 3,
    stop_after: int | None = None,
    **settings: Any,
) -> StepContext[Any]:
    """The step, with its tasks run sequentially in this process."""
    if not (folder / "documents").exists():
        write_documents(folder / "documents", texts, shards)
    in_process(monkeypatch, tokenize, stop_after)
    config = tokenize.TokenizeConfig.model_validate({"sequence_length": 64, "fim_rate": 0.1, **settings})
    inputs = {
        "documents": artifact(folder / "documents", "split-documents"),
        "tokenizer": artifact(tokenizer, "tokenizer"),
    }
    context = context_for("tokenize", config, inputs, folder / "out", Home(folder / "home"), folder / "run")
    tokenize.step.run(context)
    return context


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sets(folder: Path) -> dict[tuple[str, str], TokenSet]:
    return {
        (part, source): found
        for part in ("train", "heldout")
        for source, found in open_token_sets(str(folder / "out" / part)).items()
    }


def documents(folder: Path) -> dict[str, list[int]]:
    return {
        name: ids.tolist()
        for token_set in sets(folder).values()
        for shard in token_set.shards
        for name, ids, _ in token_set.documents(shard)
    }


def test_the_encoder_makes_no_difference(
    tmp_path: Path, texts: Texts, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = run_step(tmp_path / "fast", texts, tokenizer, monkeypatch, encoder="fast")
    reference = run_step(tmp_path / "reference", texts, tokenizer, monkeypatch, encoder="reference")
    assert files(fast.folder) == files(reference.folder)
    assert fast.counts == reference.counts
    assert fast.counts["in:documents"] == 300
    assert not [event for event in read_events(fast.run) if isinstance(event, NoteEvent)]
    spelled = {
        document_id(source, str(i)): text.replace(" ", "")
        for source, own in texts.items()
        for i, text in enumerate(own)
    }
    tokenized = documents(tmp_path / "fast")
    assert tokenized.keys() == spelled.keys()
    model = load_tokenizer(tokenizer)
    whole = [name for name, ids in tokenized.items() if model.decode(ids[1:-1]).replace(" ", "") == spelled[name]]
    assert 0.8 < len(whole) / 300 < 1, "all but those whose middle comes last"


def test_an_unsupported_tokenizer_is_a_warning(tmp_path: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenizerConfig.model_validate({"vocab_size": 320, "fim": True, "pattern": r"\s+|\S+"})
    train_tokenizer(iter(texts["a"]), config).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    context = run_step(tmp_path / "run", texts, tmp_path, monkeypatch)
    (note,) = [event for event in read_events(context.run) if isinstance(event, NoteEvent)]
    assert note.level == "warning"
    assert "gigatoken does not support this tokenizer" in note.text
    with pytest.raises(InputError, match=r"tokenize\.encoder: fast: gigatoken does not support"):
        run_step(tmp_path / "demanded", texts, tmp_path, monkeypatch, encoder="fast")


def test_documents_do_not_depend_on_the_layout_of_shards(
    tmp_path: Path, texts: Texts, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run_step(tmp_path / "1", texts, tokenizer, monkeypatch, shards=1)
    seven = run_step(tmp_path / "7", texts, tokenizer, monkeypatch, shards=7)
    assert documents(tmp_path / "1") == documents(tmp_path / "7")
    assert one.counts == seven.counts, "small shards are packed together"
    apart = run_step(tmp_path / "apart", texts, tokenizer, monkeypatch, shards=7, group_bytes=1)
    assert documents(tmp_path / "apart") == documents(tmp_path / "1")
    assert {len(found.shards) for found in sets(tmp_path / "1").values()} == {1}
    assert min(len(found.shards) for found in sets(tmp_path / "apart").values()) > 1
    assert apart.counts["train_sequences"] >= one.counts["train_sequences"]


@pytest.mark.parametrize("stop_after", [1, 23])
def test_an_interrupted_run_resumes(
    tmp_path: Path, texts: Texts, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    whole = run_step(tmp_path / "whole", texts, tokenizer, monkeypatch, shards=7, group_bytes=1)
    with pytest.raises(Interrupted):
        run_step(tmp_path / "cut", texts, tokenizer, monkeypatch, 7, stop_after, group_bytes=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "out").rglob("*.bin")}
    assert len(before) == stop_after
    again = run_step(tmp_path / "cut", texts, tokenizer, monkeypatch, 7, group_bytes=1)
    assert files(again.folder) == files(whole.folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is not done again"


def test_best_fit_is_for_training_and_held_out_documents_are_not_split(
    tmp_path: Path, texts: Texts, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = run_step(tmp_path / "fit", texts, tokenizer, monkeypatch)
    row = run_step(tmp_path / "row", texts, tokenizer, monkeypatch, packing="concatenate")
    assert documents(tmp_path / "fit") == documents(tmp_path / "row")
    assert fit.counts["out:tokens"] == row.counts["out:tokens"]
    assert fit.counts["train_documents_cut"] < row.counts["train_documents_cut"]
    heldout = {key: found for key, found in files(fit.folder).items() if key.startswith("heldout/")}
    assert heldout == {key: found for key, found in files(row.folder).items() if key.startswith("heldout/")}
    for (part, _), token_set in sets(tmp_path / "fit").items():
        rows = [row for shard in token_set.shards for row in token_set.pieces(shard).to_pylist()]
        assert part == "train" or all(row["parts"] == 1 for row in rows)
        batch = token_set.batch(range(token_set.sequences))
        assert batch.mask.sum() == token_set.tokens


def test_a_shard_of_two_sources_is_refused(
    tmp_path: Path, texts: Texts, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "documents", texts, 1)
    mixed = [{"id": source, "text": "some text", "source": source, "license": "", "meta": []} for source in ("b", "a")]
    write_shard(tmp_path / "documents" / "train" / shard_name(9), pa.Table.from_pylist(mixed, SCHEMA))
    with pytest.raises(InputError, match=r"documents-00009\.parquet mixes sources: a, b"):
        run_step(tmp_path, texts, tokenizer, monkeypatch)
