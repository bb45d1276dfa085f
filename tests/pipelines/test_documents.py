"""The text steps' own rules: readers, dedup, split, tokenizer. Ray is not needed for any of them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.baselines import ByteCounts, ByteModel, UnigramModel
from moray.pipelines.corpus import CorpusConfig, Source, _shards, _write
from moray.pipelines.documents import document_id, read_shard, shard_name, shard_paths, write_shard
from moray.pipelines.readers import DEFAULT_COLUMNS, READERS, Columns
from moray.pipelines.split import SplitConfig, is_heldout
from moray.pipelines.tokenizer import TokenizerConfig, train
from moray.platform.fingerprint import identity

WORDS = [f"word{i}" for i in range(400)]


def read(
    reader: str, path: Path, max_bytes: int = 1000, columns: Columns = DEFAULT_COLUMNS
) -> list[tuple[str | None, ...]]:
    return list(READERS[reader](path, max_bytes, columns))


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
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, suffix: str) -> None:
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
        ("#0", None, "oversized"), ("#1", "after"), ("#2", None, "malformed"), ("#3", None, "not_utf8"),
    ]  # fmt: skip


def test_the_names_of_text_and_id_can_be_given(tmp_path: Path) -> None:
    rows = ['{"body": "one", "url": "u"}', '{"body": "two", "url": null}', '{"body": "three"}', '{"text": "four"}']
    (tmp_path / "f.jsonl").write_text("\n".join(rows))
    assert read("jsonl", tmp_path / "f.jsonl", columns=Columns("body", "url")) == [
        ("#u", "one"), ("#1", "two"), ("#2", None, "malformed"), ("#3", None, "malformed"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "binary"])
def test_parquet_rows_are_documents(tmp_path: Path, kind: str) -> None:
    texts = pa.array(["one", None, "", "x" * 1001, "two"] + ["more"] * 300)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pa, kind)())
    table = pa.table({"body": texts, "url": ["a", "b", "c", "d", None] + [f"u{i}" for i in range(300)]})
    pq.write_table(table, tmp_path / "f.parquet")
    pieces = read("parquet", tmp_path / "f.parquet", columns=Columns("body"))
    assert pieces[:5] == [
        ("#0", "one"), ("#1", None, "empty"), ("#2", None, "empty"), ("#3", None, "oversized"), ("#4", "two"),
    ]  # fmt: skip
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


def test_a_row_of_bad_utf8_costs_only_itself(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": bad}), tmp_path / "f.parquet")
    assert read("parquet", tmp_path / "f.parquet") == [("#0", "fine"), ("#1", None, "not_utf8")]


def test_column_names_decide_the_result_and_are_for_rows_only(tmp_path: Path) -> None:
    source = Source(name="s", path=tmp_path, reader="parquet")
    assert identity(source) != identity(source.model_copy(update={"text_column": "body"}))
    assert identity(source) != identity(source.model_copy(update={"id_column": "url"}))
    with pytest.raises(ValueError, match="are for jsonl and parquet, not text"):
        Source(name="s", path=tmp_path, text_column="body")


def test_a_shard_is_written_in_batches_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.pipelines.corpus._BATCH_BYTES", 10)
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps({"t": "word" * (i % 3)}) for i in range(9)))
    source = Source(name="s", path=tmp_path, reader="jsonl", text_column="t", license="MIT")
    (shard,) = _shards(CorpusConfig(sources=(source,)))
    row = _write(shard, str(tmp_path), 1000)
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


def test_ids_depend_on_source_and_key_and_on_nothing_else() -> None:
    assert document_id("a", "bc") == document_id("a", "bc")
    assert len({document_id("a", "bc"), document_id("ab", "c"), document_id("a", "b")}) == 3
    assert len(document_id("a", "b")) == 32


def test_a_shard_that_breaks_the_contract_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'text' must be large_string"):
        write_shard(tmp_path / "documents-00000.parquet", pa.table({"id": ["a"], "text": ["b"]}))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds no documents"):
        shard_paths(tmp_path)


def test_files_are_listed_in_order_without_links_and_excluded_ones(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "sub/c.py", "test/d.py", "__pycache__/e.py", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path / "a.py", tmp_path / "link.py")
    source = Source(name="s", path=tmp_path, include=("**/*.py",), exclude=("test/*",))
    assert [key for key, _ in source.files()] == ["a.py", "b.py", "sub/c.py"]
    shards = _shards(CorpusConfig(sources=(source,), shard_bytes=2))
    assert [shard["keys"] for shard in shards] == [["a.py", "b.py"], ["sub/c.py"]]


def test_the_split_depends_on_the_id_alone_and_has_its_share() -> None:
    ids = [document_id("s", str(i)) for i in range(20_000)]
    share = sum(is_heldout(name, SplitConfig(heldout=0.05)) for name in ids) / len(ids)
    assert share == pytest.approx(0.05, abs=0.006)  # four standard deviations of a fair draw
    salted = SplitConfig(heldout=0.05, salt="x")
    assert any(is_heldout(i, salted) != is_heldout(i, SplitConfig(heldout=0.05)) for i in ids)


TEXTS = [f"The number {i} is {'odd' if i % 2 else 'even'}; its square is {i * i}.\n" for i in range(800)]


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = ROUND_TRIP
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_training_the_tokenizer_twice_gives_the_same() -> None:
    one, other = (train(iter(TEXTS), TokenizerConfig(vocab_size=420)).to_str() for _ in range(2))
    assert one == other
    assert [json.loads(one)["model"]["vocab"][t] for t in ("<|bos|>", "<|eos|>", "<|pad|>")] == [0, 1, 2]


ROUND_TRIP = train(iter(TEXTS), TokenizerConfig(vocab_size=420))


def test_the_byte_model_equals_its_definition() -> None:
    """Against a dictionary implementation of the same formula, one byte at a time."""
    corpus, text = [b"abracadabra", b"abba", b"cab"], b"abracab!"
    counts = ByteCounts()
    for document in corpus:
        counts.add(document)
    seen: dict[bytes, dict[int, int]] = {}
    for document in corpus:
        padded = b"\0\0" + document
        for i in range(2, len(padded)):
            for order in range(3):
                row = seen.setdefault(padded[i - order : i], {})
                row[padded[i]] = row.get(padded[i], 0) + 1
    bits, padded = 0.0, b"\0\0" + text
    for i in range(2, len(padded)):
        p = 1 / 256
        for order in range(3):
            row = seen.get(padded[i - order : i], {})
            if row:
                p = (row.get(padded[i], 0) + len(row) * p) / (sum(row.values()) + len(row))
        bits -= np.log2(p)
    assert ByteModel(counts).bits(text) == pytest.approx(bits, rel=1e-12)


def test_the_unigram_model_is_a_distribution() -> None:
    model = UnigramModel(5)
    model.add(np.array([1, 1, 3]))
    assert sum(2 ** -model.bits(np.array([i])) for i in range(5)) == pytest.approx(1.0)
    assert model.bits(np.array([1])) == pytest.approx(-np.log2(3 / 8))


def test_documents_that_repeat_an_id_are_left_out_and_counted(tmp_path: Path) -> None:
    """Two documents of one id would be removed together by dedup."""
    rows = [{"text": "one", "id": "x"}, {"text": "two", "id": "x"}, {"text": "three", "id": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = Source(name="s", path=tmp_path, reader="jsonl")
    (shard,) = _shards(CorpusConfig(sources=(source,)))
    counts = _write(shard, str(tmp_path / "out"), 1000)
    assert (counts["documents"], counts["dropped:repeated_id"]) == (2, 1)
    assert read_shard(tmp_path / "out" / shard_name(0))["text"].to_pylist() == ["one", "three"]
