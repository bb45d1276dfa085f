"""Sources: which files they have, how rows become documents, and what is written of rejects."""

from __future__ import annotations

import json
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.corpus.corpus_shard import REJECTS, rejects_name, write_corpus_shard
from moray.pipelines.corpus.globs import matches
from moray.pipelines.corpus.pieces import REASONS, Document
from moray.pipelines.corpus.readers import READERS
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source import Source, split_of
from moray.pipelines.corpus.source_file import File
from moray.pipelines.corpus.step import Corpus, CorpusConfig, corpus_shards
from moray.pipelines.shared.documents import document_id, read_shard, shard_name
from moray.platform.core.errors import RecipeError
from tests.checkout import ROOT
from tests.examples import examples

ROWS = {
    "body": ["one", "two", None, "four"],
    "page": ["http://a", None, "http://c", "http://d"],
    "license": ["MIT", None, "GPL", "BSD"],
    "date": [1, 2, 3, 4],
    "tags": [["x", "y"], [], None, ["z"]],
    "more": [{"lang": "de", "path": "p"}, None, None, {"lang": "fr", "path": "q"}],
}
COLUMNS = {
    "text_column": "body", "url_column": "page", "license_column": "license", "meta_columns": ("date", "tags", "more"),
}  # fmt: skip


def corpus(folder: Path, out: Path, **fields: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Documents, rejects and counts of one source, each a list over its shards."""
    place = {} if "url" in fields else {"path": folder}
    config = CorpusConfig(sources=(Source(name="s", **place, **fields),))
    documents, rejects, counts = [], [], {}
    for shard in corpus_shards(config):
        counts = write_corpus_shard(shard, out, config.max_document_bytes)
        documents += read_shard(out / shard_name(shard["shard"])).to_pylist()
        rejects += read_shard(out / rejects_name(shard["shard"])).to_pylist()
    return documents, rejects, counts


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow stream", "arrow file"])
def test_columns_become_text_licence_and_metadata(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    table = pa.table(ROWS)
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    elif kind == "parquet":
        pq.write_table(table, folder / "a.parquet")
    else:
        new = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with new(folder / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
    reader = kind if kind in READERS else "huggingface"
    documents, rejects, _ = corpus(folder, tmp_path, reader=reader, license="other", **COLUMNS)
    name = next(folder.iterdir()).name
    assert [(row["text"], row["license"]) for row in documents] == [("one", "MIT"), ("two", "other"), ("four", "BSD")]
    assert documents[0]["id"] == document_id("s", f"{name}#0")
    assert documents[0]["meta"] == [
        ("path", f"{name}#0"),
        ("url", "http://a"),
        ("date", "1"),
        ("tags", '["x", "y"]'),
        ("lang", "de"),
        ("more.path", "p"),
    ]
    assert documents[1]["meta"] == [("path", f"{name}#1"), ("date", "2"), ("tags", "[]")]
    assert [(row["key"], row["reason"]) for row in rejects] == [(f"{name}#2", "empty")]


def test_rejects_are_recorded_with_reason_and_detail(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [
        '{"text": "fine"}',
        "{torn",
        '{"other": 1}',
        '{"text": 5}',
        '["text"]',
        '{"text": "\\u0000"}',
        '{"text": ""}',
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(b"no gzip")
    documents, rejects, counts = corpus(folder, tmp_path, reader="jsonl")
    assert [row["text"] for row in documents] == ["fine"]
    assert [(row["source"], row["key"], row["reason"]) for row in rejects] == [
        ("s", "a.jsonl#1", "malformed"),
        ("s", "a.jsonl#2", "malformed"),
        ("s", "a.jsonl#3", "malformed"),
        ("s", "a.jsonl#4", "malformed"),
        ("s", "a.jsonl#5", "binary"),
        ("s", "a.jsonl#6", "empty"),
        ("s", "b.jsonl.gz", "malformed"),
    ]
    details = [row["detail"] for row in rejects]
    assert details[1:4] == [
        "no field 'text'; the row has: other",
        "the field 'text' is int, not a string",
        "not a JSON object",
    ]
    assert "line 1 column 2" in details[0]
    assert sum(n for name, n in counts.items() if name.startswith("dropped:")) == len(rejects)
    assert pq.read_schema(tmp_path / rejects_name(0)).names == REJECTS.names


def test_wrong_columns_name_those_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), folder / "a.parquet")
    for column, detail in {
        "text": "no column 'text'; the file has: content, n",
        "n": "the column 'n' is int64, not text",
    }.items():
        (tmp_path / column).mkdir()
        _, rejects, _ = corpus(folder, tmp_path / column, reader="parquet", text_column=column)
        assert [(row["key"], row["reason"], row["detail"]) for row in rejects] == [("a.parquet", "malformed", detail)]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_invalid_utf8_in_a_name_or_an_address_is_accepted(tmp_path: Path, suffix: str) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff\xfe"], pa.binary()).buffers())
    table = pa.table({"text": ["one", "two"], "name": bad})
    (tmp_path / "data").mkdir()
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "data/a.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "data/a.arrow", table.schema) as writer:
            writer.write_table(table)
    documents, rejects, _ = corpus(
        tmp_path / "data", tmp_path, reader="huggingface", id_column="name", url_column="name"
    )
    assert [row["text"] for row in documents] == ["one", "two"]
    assert [dict(row["meta"])["url"] for row in documents] == ["fine", "\ufffd\ufffd"]
    assert not rejects


def test_an_arrow_file_that_points_out_of_its_memory_is_refused(tmp_path: Path) -> None:
    offsets = pa.py_buffer(struct.pack("<3i", 0, -5, 7))
    wild = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"onetwo!")])
    for name in ("text", "url"):
        table = pa.table({"text": ["a", "b"], "url": ["a", "b"], name: wild})
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        (piece,) = READERS["huggingface"](File(str(tmp_path / "a.arrow")), 100, Columns(url="url"))
        assert piece[:2] == ("", "malformed")


def test_a_shard_that_is_there_is_taken_as_it_is_and_half_a_one_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("text")
    (shard,) = corpus_shards(CorpusConfig(sources=(Source(name="s", path=tmp_path / "data"),)))
    first = write_corpus_shard(shard, tmp_path, 1000)
    (tmp_path / "data/a.txt").unlink()
    assert write_corpus_shard(shard, tmp_path, 1000) == first
    (tmp_path / rejects_name(0)).unlink()
    assert write_corpus_shard(shard, tmp_path, 1000)["dropped:unreadable"] == 1


def test_a_folder_that_datasets_saved_is_read_by_split(tmp_path: Path) -> None:
    """The files that `save_to_disk` of datasets 5 leaves, with the caches that a later `filter` adds."""
    table = pa.table({"text": ["one", "two"]})
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-0a1b2c3d.arrow"):
            with pa.ipc.new_stream(tmp_path / split / name, table.schema) as writer:
                writer.write_table(table)
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = Source(name="s", path=tmp_path, reader="huggingface")
    assert [key for key, _ in source.files()] == [f"train/data-0000{i}-of-00002.arrow" for i in range(2)]
    other = source.model_copy(update={"split": "test"})
    assert [key for key, _ in other.files()] == [f"test/data-0000{i}-of-00002.arrow" for i in range(2)]


@pytest.mark.parametrize(
    ("key", "split"),
    [
        ("data/train-00000-of-00005.parquet", "train"), ("data/test-00000-of-00001.parquet", "test"),
        ("en/validation/0.parquet", "validation"), ("dev.jsonl", "validation"), ("part-1.parquet", "train"),
        ("test/train-0.parquet", "train"), ("latest/contest.parquet", "train"), ("train/x/eval_1.parquet", "test"),
    ],
)  # fmt: skip
def test_the_nearest_name_says_the_split(key: str, split: str) -> None:
    assert split_of(key) == split


NAMES = st.sampled_from(["a", "b.txt", "ab.py", ".hid", "x.jsonl.gz", "[z]"])
PARTS = st.sampled_from(["a", "*", "?", "*.py", "a*", "**", "[ab]*", "[!a]*", ".h*", "*.gz", "[[]z]"])


@settings(max_examples=examples(60))
@given(
    st.sets(st.lists(NAMES, min_size=1, max_size=4).map("/".join), max_size=8), st.lists(PARTS, min_size=1, max_size=4)
)
def test_patterns_match_keys_of_a_bucket_as_paths_of_a_folder(keys: set[str], parts: list[str]) -> None:
    pattern = "/".join(parts)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = set()
        for key in sorted(keys):
            if not any(parent.is_file() for parent in (root / key).parents) and not (root / key).is_dir():
                (root / key).parent.mkdir(parents=True, exist_ok=True)
                (root / key).touch()
                made.add(key)
        found = {path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file()}
    assert {key for key in made if matches(key, pattern)} == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give exactly one of `path`, `package` and `url`"),
        ({"path": "a", "url": "s3://b/c"}, "give exactly one of `path`, `package` and `url`"),
        ({"url": "https://b/c"}, "String should match pattern"),
        ({"path": "a", "meta_columns": ["x"]}, "need a reader of rows: jsonl, parquet, huggingface"),
        ({"path": "a", "reader": "parquet", "split": "test"}, "`split` needs the reader huggingface"),
    ],
)
def test_sources_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(name="s", **fields)


def test_the_page_on_sources_is_true() -> None:
    """Its example is valid, and its table has every field."""
    page = (ROOT / "docs" / "corpus.md").read_text()
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.S | re.M)
    sources = yaml.safe_load(snippet)["steps"]["corpus"]["with"]["sources"]
    assert {Source.model_validate(source).reader for source in sources} == set(READERS) - {"pythonbible"}
    for field in Source.model_fields:
        assert f"`{field}`" in page.partition("## Readers")[0], field
    for reader in READERS:
        assert f"| `{reader}` |" in page, reader


def test_a_missing_source_names_the_command_that_creates_it(tmp_path: Path) -> None:
    source = Source(name="s", path=tmp_path / "gone", made_by="make it")
    with pytest.raises(RecipeError, match=r"sources\.0: source 's': .*gone does not exist") as caught:
        Corpus().check(CorpusConfig(sources=(source,)), {})
    assert caught.value.hint == "run `make it` to create it"


@settings(max_examples=examples(60))
@given(st.sampled_from(["jsonl", "parquet", "huggingface", "text"]), st.data())
def test_whatever_happens_to_a_file_nothing_raises_and_all_is_counted(reader: str, data: st.DataObject) -> None:
    table = pa.table({"text": [f"text {i}" * i for i in range(40)], "url": ["u"] * 40})
    sink = pa.BufferOutputStream()
    if reader == "parquet":
        pq.write_table(table, sink)
    elif reader == "huggingface":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        sink.write("\n".join(json.dumps(row) for row in table.to_pylist()).encode())
    content = bytearray(sink.getvalue().to_pybytes())
    for _ in range(data.draw(st.integers(0, 8))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=12))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.arrow" if reader == "huggingface" else "a")
        path.write_bytes(bytes(content))
        columns = Columns() if reader == "text" else Columns(url="url")
        pieces = list(READERS[reader](File(str(path)), 10_000, columns))
    assert pieces or not content.strip()
    for piece in pieces:
        if isinstance(piece, Document):
            assert piece.text.encode().decode() == piece.text
        else:
            assert piece.reason in REASONS
