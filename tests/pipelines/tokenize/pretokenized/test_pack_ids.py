"""Pretokenized sources through the step `tokenize`: what becomes of every document, and of wrong ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.data.token_set import open_token_sets
from moray.pipelines.shared.documents import document_id
from moray.pipelines.split import SplitConfig, is_heldout
from moray.pipelines.tokenize import step as tokenize
from moray.pipelines.tokenizer.token_bytes import token_bytes
from moray.pipelines.tokenizer.train import load_tokenizer
from moray.platform.core.errors import InputError
from moray.platform.core.events import NoteEvent, read_events
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.store.artifacts import Artifact
from tests.examples import examples
from tests.pipelines.step_runs import Interrupted, in_process
from tests.pipelines.tokenize.pretokenized.id_files import (
    write_megatron,
    write_parquet_ids,
    write_saved_dataset,
    write_tokenizer,
)
from tests.step_contexts import context_for, manifest_of

BOS, EOS, PAD = 0, 1, 2
DOCUMENTS = [[10 + n % 200] * (n % 23 + 1) for n in range(120)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("ids") / "tokenizer")


def run_step(
    folder: Path, tokenizer: Path, sources: list[dict[str, Any]], stop_after: int | None = None, **settings: Any
) -> StepContext[Any]:
    """The step, with its tasks run sequentially in this process."""
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, tokenize, stop_after)
        values = {"sequence_length": 16, "pretokenized": sources, **settings}
        config = tokenize.TokenizeConfig.model_validate(values)
        inputs = {"tokenizer": Artifact(tokenizer, manifest_of("tokenizer", "ab", "tokenizer"))}
        context = context_for("tokenize", config, inputs, folder / "out", Home(folder / "home"), folder / "run")
        tokenize.step.run(context)
    return context


def documents(folder: Path, part: str) -> dict[str, list[int]]:
    return {
        name: ids.tolist()
        for token_set in open_token_sets(str(folder / "out" / part)).values()
        for shard in token_set.shards
        for name, ids, _ in token_set.documents(shard)
    }


def everything(folder: Path) -> dict[str, list[int]]:
    parts = [documents(folder, path.name) for path in (folder / "out").iterdir()]
    return {name: ids for part in parts for name, ids in part.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(source: str, keys: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {document_id(source, key): [BOS, *ids, EOS] for key, ids in keys.items()}


def test_all_formats_become_token_sets(tmp_path: Path, tokenizer: Path) -> None:
    half = len(DOCUMENTS) // 2
    write_megatron(tmp_path / "m" / "x" / "one", [[ids] for ids in DOCUMENTS[:half]])
    write_megatron(tmp_path / "m" / "two", [[ids[:1], ids[1:]] for ids in DOCUMENTS[half:]], "int32")
    write_megatron(tmp_path / "m" / "other", [[[99]]])
    write_parquet_ids(tmp_path / "p" / "train.parquet", DOCUMENTS)
    write_parquet_ids(tmp_path / "p" / "test.parquet", [[99]])
    write_saved_dataset(tmp_path / "saved", DOCUMENTS)
    sources = [
        {"name": "megatron", "format": "megatron", "path": tmp_path / "m", "include": ["x/*", "two"], "heldout": 0.2},
        {"name": "parquet", "format": "huggingface", "path": tmp_path / "p", "heldout": 0},
        {"name": "saved", "format": "huggingface", "path": tmp_path / "saved", "salt": "other", "heldout": 0.2},
    ]
    context = run_step(tmp_path, tokenizer, sources)
    wanted = {
        "megatron": {f"x/one#{n}": ids for n, ids in enumerate(DOCUMENTS[:half])}
        | {f"two#{n}": ids for n, ids in enumerate(DOCUMENTS[half:])},
        "parquet": {f"train.parquet#{n}": ids for n, ids in enumerate(DOCUMENTS)},
        "saved": {f"data-0000{n // half}-of-00002.arrow#{n % half}": ids for n, ids in enumerate(DOCUMENTS)},
    }
    rules = {"megatron": SplitConfig(heldout=0.2), "saved": SplitConfig(heldout=0.2, salt="other")}
    for part in ("train", "heldout"):
        assert documents(tmp_path, part) == {
            name: ids
            for source, keys in wanted.items()
            for name, ids in expected(source, keys).items()
            if (source in rules and is_heldout(name, rules[source])) == (part == "heldout")
        }
    assert context.counts["in:documents"] == 3 * len(DOCUMENTS)
    assert context.counts["heldout_tokens"] > 0
    sizes = token_bytes(load_tokenizer(tokenizer))
    found = open_token_sets(str(tmp_path / "out" / "train"))["parquet"]
    assert found.bytes == sum(int(sizes[ids].sum()) for ids in DOCUMENTS)
    notes = [event.text for event in read_events(context.run) if isinstance(event, NoteEvent)]
    assert notes[0] == "source 'megatron': 120 documents: bos added to 120, eos added to 120"


@pytest.mark.parametrize("path", ["m/one", "m/one.idx", "m/one.bin"])
def test_a_prefix_is_a_location(tmp_path: Path, tokenizer: Path, path: str) -> None:
    write_megatron(tmp_path / "m" / "one", [[[5, 6]]])
    write_megatron(tmp_path / "m" / "one_more", [[[7]]])
    run_step(tmp_path, tokenizer, [{"name": "a", "format": "megatron", "path": tmp_path / path, "heldout": 0}])
    assert everything(tmp_path) == expected("a", {"one#0": [5, 6]})


@given(
    rows=st.lists(st.lists(st.sampled_from([BOS, EOS, 5, 6, 7]), max_size=9), min_size=1, max_size=20).filter(any),
    group_bytes=st.sampled_from([4, 40, 4000]),
    packing=st.sampled_from(["best-fit", "concatenate"]),
)
@settings(max_examples=examples(30))
def test_ids_survive_by_document(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Path,
    rows: list[list[int]],
    group_bytes: int,
    packing: str,
) -> None:
    """Whatever the groups: a stored document ends after each eos; bos and eos are added where they are missing."""
    folder = tmp_path_factory.mktemp("round")
    write_megatron(folder / "m", [[row] for row in rows])
    source = {"name": "a", "format": "megatron", "path": folder / "m", "heldout": 0.3}
    run_step(folder, tokenizer, [source], group_bytes=group_bytes, packing=packing)
    wanted = {}
    for n, row in enumerate(rows):
        parts: list[list[int]] = [[]]
        for i in row:
            parts[-1].append(i)
            if i == EOS:
                parts.append([])
        for part, ids in enumerate(parts if parts[-1] else parts[:-1]):
            framed = [BOS] * (ids[0] != BOS) + ids + [EOS] * (ids[-1] != EOS)
            wanted[document_id("a", f"m#{n}.{part}" if part else f"m#{n}")] = framed
    assert everything(folder) == wanted


def test_documents_do_not_depend_on_groups_or_interruptions(tmp_path: Path, tokenizer: Path) -> None:
    write_megatron(tmp_path / "m" / "one", [[ids] for ids in DOCUMENTS])
    write_parquet_ids(tmp_path / "p" / "a.parquet", DOCUMENTS)
    sources = [
        {"name": "m", "format": "megatron", "path": tmp_path / "m", "heldout": 0.1},
        {"name": "p", "format": "huggingface", "path": tmp_path / "p", "heldout": 0.1},
    ]
    small = {"group_bytes": 1000}
    run_step(tmp_path / "one", tokenizer, sources)
    whole = run_step(tmp_path / "whole", tokenizer, sources, **small)
    assert everything(tmp_path / "one") == everything(tmp_path / "whole")
    assert min(len(found.shards) for found in open_token_sets(str(tmp_path / "whole" / "out" / "train")).values()) > 2
    with pytest.raises(Interrupted):
        run_step(tmp_path / "cut", tokenizer, sources, stop_after=5, **small)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.bin")}
    assert before
    again = run_step(tmp_path / "cut", tokenizer, sources, **small)
    assert files(again.folder) == files(whole.folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is not done again"


def test_a_large_row_group_is_several_shards(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.pipelines.tokenize.pretokenized.id_tables.READ_BYTES", 100)
    write_parquet_ids(tmp_path / "a.parquet", DOCUMENTS, row_group=1000)
    source = {"name": "a", "format": "huggingface", "path": tmp_path / "a.parquet", "heldout": 0}
    run_step(tmp_path, tokenizer, [source], group_bytes=400)
    (found,) = open_token_sets(str(tmp_path / "out" / "train")).values()
    assert max(shard.tokens for shard in found.shards) < 2 * 100 + 100
    assert len(everything(tmp_path)) == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([[5], [5, 301]], {}, r"m\.bin: document 1, position 1: id 301 is outside the vocabulary of 300 tokens"),
        ([[5, -1]], {}, "document 0, position 1: id -1 is outside the vocabulary"),
        ([[5, PAD]], {}, "document 0, position 1: id 2 is the padding token"),
        ([[BOS, 5], [6]], {"bos": "present"}, r"document 1: does not begin with bos \(id 0\)"),
        ([[5, EOS], [], [6]], {"eos": "present"}, r"document 2: does not end with eos \(id 1\)"),
        ([[], []], {}, "source 'a' has no document with ids"),
    ],
)
def test_wrong_documents_are_refused(
    tmp_path: Path, tokenizer: Path, rows: list[list[int]], fields: dict[str, Any], message: str
) -> None:
    write_megatron(tmp_path / "m", [[row] for row in rows], "int32")
    with pytest.raises(InputError, match=message):
        run_step(tmp_path, tokenizer, [{"name": "a", "format": "megatron", "path": tmp_path / "m", **fields}])


def test_a_fraction_is_no_id(tmp_path: Path, tokenizer: Path) -> None:
    write_megatron(tmp_path / "m", [[[5.0, 6.5]]], "float32")  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"position 1: id 6\.5 is outside the vocabulary"):
        run_step(tmp_path, tokenizer, [{"name": "a", "format": "megatron", "path": tmp_path / "m"}])


def test_records_are_not_part_of_the_result(tmp_path: Path, tokenizer: Path) -> None:
    write_megatron(tmp_path / "m", [[[5]], [[6]]])
    context = run_step(tmp_path, tokenizer, [{"name": "a", "format": "megatron", "path": tmp_path / "m", "heldout": 0}])
    assert {path.relative_to(context.folder).as_posix() for path in context.folder.rglob("*") if path.is_file()} == {
        "train/a/index.json", "train/a/tokens-00000.bin", "train/a/starts-00000.parquet"
    }  # fmt: skip
    assert json.loads((context.folder / "train" / "a" / "index.json").read_text())["vocabulary"]["size"] == 300
