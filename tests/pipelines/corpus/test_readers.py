"""Readers of files and rows: what each makes of good content, and that bad content is left out with a reason."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moray.pipelines.corpus import step as corpus_step
from moray.pipelines.corpus.corpus_shard import write_corpus_shard
from moray.pipelines.corpus.pieces import Document, Piece, Reject, meta_of
from moray.pipelines.corpus.readers import READERS
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source import Source
from moray.pipelines.corpus.source_file import File
from moray.pipelines.corpus.step import CorpusConfig, corpus_shards
from moray.pipelines.shared.documents import document_id, read_shard, shard_name
from moray.platform.plan.fingerprint import identity

TEXT = Columns()


def read(reader: str, path: Path, max_bytes: int = 1000, columns: Columns = TEXT) -> list[tuple[str | None, ...]]:
    """(key, text) of documents, (key, None, reason) of what is left out."""
    pieces = READERS[reader](File(str(path)), max_bytes, columns)
    return [(piece.key, None, piece.reason) if isinstance(piece, Reject) else piece[:2] for piece in pieces]


def compressed(data: bytes, suffix: str) -> bytes:
    return gzip.compress(data) if suffix == ".gz" else pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"a\0b", "binary"), (b"\xff\xfe!", "not_utf8"), (b"x" * 1001, "oversized")],
)
def test_unusable_files_are_left_out_with_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "f").write_bytes(data)
    assert read("text", tmp_path / "f") == [("", None, reason)]


def test_an_unreadable_file_is_left_out(tmp_path: Path) -> None:
    assert read("text", tmp_path / "gone") == [("", None, "unreadable")]


def test_line_ends_are_made_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\r\nb\n")
    assert read("text", tmp_path / "f") == [("", "a\nb\n")]


def test_json_lines_keep_going_after_a_bad_one(tmp_path: Path) -> None:
    rows = ['{"text": "one", "id": "x"}', "{torn", '{"no": "text"}', '{"text": 5}', '{"text": "two"}', "", '"text"']
    (tmp_path / "f.jsonl").write_text("\n".join(rows))
    assert read("jsonl", tmp_path / "f.jsonl") == [
        ("#x", "one"),
        ("#1", None, "malformed"),
        ("#2", None, "malformed"),
        ("#3", None, "malformed"),
        ("#4", "two"),
        ("#6", None, "malformed"),
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_by_content(tmp_path: Path, suffix: str) -> None:
    rows = b'{"text": "one"}\n{"text": "two"}\n'
    # Two members in one file, as parallel compressors write them.
    (tmp_path / f"f.jsonl{suffix}").write_bytes(compressed(rows, suffix) + compressed(rows, suffix))
    assert read("jsonl", tmp_path / f"f.jsonl{suffix}") == [("#0", "one"), ("#1", "two"), ("#2", "one"), ("#3", "two")]
    (tmp_path / f"f.txt{suffix}").write_bytes(compressed(b"a\r\nb", suffix))
    assert read("text", tmp_path / f"f.txt{suffix}") == [("", "a\nb")]
    (tmp_path / f"bomb{suffix}").write_bytes(compressed(b"x" * 50_000_000, suffix))
    assert read("text", tmp_path / f"bomb{suffix}") == [("", None, "oversized")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("reader", ["text", "jsonl"])
def test_a_damaged_archive_is_left_out_once(tmp_path: Path, suffix: str, reader: str) -> None:
    path = tmp_path / f"f{suffix}"
    whole = compressed(b'{"text": "one"}\n' * 9, suffix)
    for data in (whole[:-6], b"not compressed at all"):
        path.write_bytes(data)
        assert read(reader, path)[-1] == ("", None, "malformed")
        assert [piece[-1] for piece in read(reader, path)].count("malformed") == 1
    path.unlink()
    assert read(reader, path) == [("", None, "unreadable")]
    path.mkdir()
    assert read(reader, path) == [("", None, "unreadable")]


def test_lines_before_the_damage_are_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [json.dumps({"text": random.bytes(400).hex()}) for _ in range(2000)]
    data = gzip.compress("\n".join(rows).encode())
    (tmp_path / "f.jsonl.gz").write_bytes(data[: len(data) * 3 // 4])
    pieces = read("jsonl", tmp_path / "f.jsonl.gz")
    assert len(pieces) > 1000
    assert [piece for piece in pieces if piece[1] is None] == [("", None, "malformed")]


def test_a_line_too_long_is_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [b'{"text": "' + b"x" * 3_000_000 + b'"}', b'{"text": "after"}', b"[" * 200_000, b'{"text": "\\ud800"}']
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    assert read("jsonl", tmp_path / "f.jsonl") == [
        ("#0", None, "oversized"),
        ("#1", "after"),
        ("#2", None, "malformed"),
        ("#3", None, "not_utf8"),
    ]


def test_the_names_of_text_and_id_can_be_given(tmp_path: Path) -> None:
    rows = ['{"body": "one", "url": "u"}', '{"body": "two", "url": null}', '{"body": "three"}', '{"text": "four"}']
    (tmp_path / "f.jsonl").write_text("\n".join(rows))
    assert read("jsonl", tmp_path / "f.jsonl", columns=Columns("body", "url")) == [
        ("#u", "one"),
        ("#1", "two"),
        ("#2", None, "malformed"),
        ("#3", None, "malformed"),
    ]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "binary"])
def test_parquet_rows_are_documents(tmp_path: Path, kind: str) -> None:
    texts = pa.array(["one", None, "", "x" * 1001, "two"] + ["more"] * 300)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pa, kind)())
    table = pa.table({"body": texts, "url": ["a", "b", "c", "d", None] + [f"u{i}" for i in range(300)]})
    pq.write_table(table, tmp_path / "f.parquet")
    pieces = read("parquet", tmp_path / "f.parquet", columns=Columns("body"))
    assert pieces[:5] == [
        ("#0", "one"),
        ("#1", None, "empty"),
        ("#2", None, "empty"),
        ("#3", None, "oversized"),
        ("#4", "two"),
    ]
    assert pieces[-1] == ("#304", "more")
    keys = [piece[0] for piece in read("parquet", tmp_path / "f.parquet", columns=Columns("body", "url"))]
    assert keys[:6] == ["#a", "#b", "#c", "#d", "#4", "#u0"]


def test_a_parquet_file_that_cannot_be_used_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    assert read("parquet", path) == [("", None, "unreadable")]
    pq.write_table(pa.table({"text": ["a", "b"], "number": [1, 2]}), path)
    assert read("parquet", path, columns=Columns("body")) == [("", None, "malformed")], "no such column"
    assert read("parquet", path, columns=Columns("number")) == [("", None, "malformed")], "not text"
    assert read("parquet", path, columns=Columns("text", "url")) == [("", None, "malformed")], "no such id"
    whole = path.read_bytes()
    for data in (b"", whole[:-9], whole[:4] + b"\xff" * 40 + whole[44:]):
        path.write_bytes(data)
        assert read("parquet", path) == [("", None, "malformed")]


def test_a_row_of_invalid_utf8_affects_no_other_row(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": bad}), tmp_path / "f.parquet")
    assert read("parquet", tmp_path / "f.parquet") == [("#0", "fine"), ("#1", None, "not_utf8")]


def test_column_names_decide_the_result_and_are_for_rows_only(tmp_path: Path) -> None:
    source = Source(name="s", path=tmp_path, reader="parquet")
    assert identity(source) != identity(source.model_copy(update={"text_column": "body"}))
    assert identity(source) != identity(source.model_copy(update={"id_column": "url"}))
    with pytest.raises(ValueError, match="need a reader of rows: jsonl, parquet, huggingface"):
        Source(name="s", path=tmp_path, text_column="body")


def test_a_shard_is_written_in_batches_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.pipelines.corpus.corpus_shard._BATCH_BYTES", 10)
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps({"t": "word" * (i % 3)}) for i in range(9)))
    source = Source(name="s", path=tmp_path, reader="jsonl", text_column="t", license="MIT")
    (shard,) = corpus_shards(CorpusConfig(sources=(source,)))
    row = write_corpus_shard(shard, tmp_path, 1000)
    assert (row["documents"], row["bytes"], row["dropped:empty"]) == (6, 36, 3)
    table = read_shard(tmp_path / "documents-00000.parquet")
    assert table["id"].to_pylist() == [document_id("s", f"f.jsonl#{i}") for i in (1, 2, 4, 5, 7, 8)]
    assert set(table["license"].to_pylist()) == {"MIT"}


def test_a_pythonbible_module_is_read_by_chapter(tmp_path: Path) -> None:
    code = 'x = Bible(V.K, """1. aa 2. bb 1. cc""", {1001001: 0, 1001002: 6, 1002001: 12}, '
    code += "{1001001: 5, 1001002: 11, 1002001: 17})"
    (tmp_path / "m.py").write_text(code)
    assert read("pythonbible", tmp_path / "m.py") == [("#1001", "1. aa 2. bb"), ("#1002", "1. cc")]
    (tmp_path / "m.py").write_text("import this")
    assert read("pythonbible", tmp_path / "m.py") == [("", None, "malformed")]


def test_files_are_listed_in_order_with_links_to_files_and_without_excluded_ones(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "sub/c.py", "test/d.py", "__pycache__/e.py", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path / "a.py", tmp_path / "link.py")
    source = Source(name="s", path=tmp_path, include=("**/*.py",), exclude=("test/*",))
    assert [key for key, _ in source.files()] == ["a.py", "b.py", "link.py", "sub/c.py"]
    shards = corpus_shards(CorpusConfig(sources=(source,), shard_bytes=2))
    assert [shard["keys"] for shard in shards] == [["a.py", "b.py"], ["link.py", "sub/c.py"]]


def test_documents_that_repeat_an_id_are_left_out_and_counted(tmp_path: Path) -> None:
    """Two documents of one id would be removed together by dedup."""
    rows = [{"text": "one", "id": "x"}, {"text": "two", "id": "x"}, {"text": "three", "id": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = Source(name="s", path=tmp_path, reader="jsonl")
    (shard,) = corpus_shards(CorpusConfig(sources=(source,)))
    counts = write_corpus_shard(shard, tmp_path / "out", 1000)
    assert (counts["documents"], counts["dropped:repeated_id"]) == (2, 1)
    assert read_shard(tmp_path / "out" / shard_name(0))["text"].to_pylist() == ["one", "three"]


def untouched(kind: pa.DataType, storage: pa.Array) -> pa.Array:
    """An array of a type that its values are not valid for."""
    return pa.Array.from_buffers(kind, len(storage), storage.buffers())


BAD = untouched(pa.string(), pa.array([b"good", b"b\xffd", b"good"]))
# Values beside the text that Python or JSON cannot hold as they are, and what becomes of the second one, if it is one.
ODD: dict[str, tuple[pa.Array, str | None]] = {
    "year 30000": (pa.array([0, 884541351600000000, 0], pa.timestamp("us")), "30000-01-01 03:00:00.000000"),
    "before year 1": (pa.array([0, -62135596801, 0], pa.timestamp("us")), "1969-12-31 06:44:24.403199"),
    "long before": (pa.array([0, -62135596801000, 0], pa.timestamp("ms")), "0000-12-31 23:59:59.000"),
    "a far day": (pa.array([0, 10_000_000, 0], pa.date32()), "29349-01-26"),
    "an unknown zone": (pa.array([0, 1, 0], pa.timestamp("s", "Mars/Olympus")), "1970-01-01 00:00:01+00:00"),
    "nanoseconds": (pa.array([0, 1, 0], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "a long time": (pa.array([0, 2**62, 0], pa.duration("s")), "4611686018427387904"),
    "bad UTF-8": (BAD, "b\ufffdd"),
    "bad UTF-8 in a list": (pa.ListArray.from_arrays([0, 1, 2, 3], BAD), None),
    "bad UTF-8 in a struct": (pa.StructArray.from_arrays([BAD], names=["odd"]), "b\ufffdd"),
    "lists as keys": (
        pa.array([[], [(["odd"], "b")], []], pa.map_(pa.list_(pa.string()), pa.string())), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("reader", ["parquet", "huggingface"])
def test_an_invalid_value_in_another_column_costs_no_row(tmp_path: Path, kind: str, reader: str) -> None:
    column, wanted = ODD[kind]
    table = pa.table({"text": ["one", "two", "three"], "odd": column})
    path = tmp_path / ("f.parquet" if reader == "parquet" else "f.arrow")
    if reader == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    pieces = list(READERS[reader](File(str(path)), 1000, Columns(meta=("odd",))))
    documents = {piece.text: dict(piece.meta) for piece in pieces if isinstance(piece, Document)}
    assert list(documents) == ["one", "two", "three"]
    assert wanted is None or documents["two"]["odd"] == wanted
    assert len(pieces) == 3


def test_a_value_that_has_no_form_is_counted(tmp_path: Path) -> None:
    """Deeper than JSON is written; and, of Parquet, a column that cannot be read while the text can."""
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    meta, (lost,) = meta_of([("odd", deep), ("fine", 2)])
    assert meta == (("fine", "2"),)
    assert lost.startswith("cannot convert the value of 'odd': ")
    path = tmp_path / "f.parquet"
    table = pa.table({"text": ["one " * 9] * 3, "odd": ["a" * 50] * 3})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    start = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    pieces = list(READERS["parquet"](File(str(path)), 1000, Columns(meta=("odd",))))
    assert [(piece.key, len(piece)) for piece in pieces if isinstance(piece, Document)] == [
        ("#0", 4),
        ("#1", 4),
        ("#2", 4),
    ]
    assert pieces[0][1] == "value"
    assert pieces[0][2].startswith("from row 0 on, 'odd': ")


@pytest.mark.parametrize(
    "odd", ["[" * 600 + "]" * 600, "9" * 5000, '"\\ud800"', '{"a": {"b": [NaN, 1e999]}}', '"\xff"', "{}"]
)
@pytest.mark.parametrize("column", ["odd", "id"])
def test_an_invalid_value_in_a_json_line_affects_no_later_line(tmp_path: Path, odd: str, column: str) -> None:
    rows = ['{"text": "one"}', f'{{"text": "two", "{column}": {odd}}}', '{"text": "three"}']
    (tmp_path / "f.jsonl").write_bytes("\n".join(rows).encode("latin-1"))
    pieces = list(READERS["jsonl"](File(str(tmp_path / "f.jsonl")), 1000, Columns(meta=("odd",))))
    texts = [piece.text for piece in pieces if isinstance(piece, Document)]
    assert texts[0] == "one"
    assert texts[-1] == "three"
    assert "two" in texts or any(isinstance(piece, Reject) and piece.key == "#1" for piece in pieces)
    if column == "odd":
        assert "two" in texts


def test_a_damaged_row_group_affects_no_other(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    texts = [f"row {i} " * 9 for i in range(90)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=30, compression="none", use_dictionary=False)
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    pieces = list(READERS["parquet"](File(str(path)), 1000, Columns()))
    assert [piece.key for piece in pieces] == [*(f"#{i}" for i in range(30)), "", *(f"#{i}" for i in range(60, 90))]
    (reject,) = (piece for piece in pieces if isinstance(piece, Reject))
    assert reject.detail.startswith("from row 30 on: ")


def test_ids_and_row_numbers_are_distinguished(tmp_path: Path) -> None:
    rows = ['{"text": "a", "id": 1}', '{"text": "b"}', '{"text": "c", "id": "2"}', '{"text": "d", "id": 3}',
            '{"text": "e"}', '{"text": "f", "id": 4}', '{"text": "g", "id": 4}']  # fmt: skip
    (tmp_path / "f.jsonl").write_text("\n".join(rows))
    config = CorpusConfig(sources=(Source(name="s", path=tmp_path / "f.jsonl", reader="jsonl"),))
    (shard,) = corpus_shards(config)
    counts = write_corpus_shard(shard, tmp_path / "out", 1000)
    found = read_shard(tmp_path / "out" / shard_name(0))
    assert counts["dropped:repeated_id"] == 1
    assert [dict(meta)["path"] for meta in found["meta"].to_pylist()] == [
        "f.jsonl#1",
        "f.jsonl#row 1",
        "f.jsonl#2",
        "f.jsonl#3",
        "f.jsonl#4",
        "f.jsonl#id 4",
    ]
    assert len(set(found["id"].to_pylist())) == 6


def test_an_error_of_ours_names_the_file_and_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a crawl of a million files, nobody would find it else."""

    def broken(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
        yield Document("#7", "text")
        raise OverflowError("signed integer is greater than maximum")

    monkeypatch.setitem(READERS, "jsonl", broken)
    (tmp_path / "a.jsonl").write_text("{}")
    (shard,) = corpus_shards(CorpusConfig(sources=(Source(name="s", path=tmp_path, reader="jsonl"),)))
    with pytest.raises(RuntimeError, match=r"s/a\.jsonl, after document '#7': OverflowError: signed integer"):
        write_corpus_shard(shard, tmp_path / "out", 1000)


def test_an_empty_corpus_reports_the_first_reject(tmp_path: Path) -> None:
    for content, words in (
        (b'[\n{"text": "a"}\n]', "the file is a JSON array"),
        (b'{"txt": 1}', "no field 'text'"),
    ):
        (tmp_path / "a.jsonl").write_bytes(content)
        config = CorpusConfig(sources=(Source(name="s", path=tmp_path / "a.jsonl", reader="jsonl"),))
        shards = corpus_shards(config)
        out = tmp_path / words[:9]
        write_corpus_shard(shards[0], out, 1000)
        hint = corpus_step._first_reject(out, shards)
        assert hint.startswith(f"first: s/a.jsonl#0: malformed: {words}")
        assert hint.endswith(f"all are in {out}/rejected-*.parquet")
