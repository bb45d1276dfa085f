"""Compressed files are read as their own tools read them, whatever their names; a byte order mark is removed."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.corpus.pieces import Document, Piece
from moray.pipelines.corpus.readers import READERS
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source_file import File
from moray.pipelines.corpus.unpack import Damaged, DecompressedFile, compression_of
from tests.examples import examples

COMPRESS = {"gzip": gzip.compress, "zstd": zstd.compress}


def unpacked(data: bytes, kind: str) -> tuple[bytes, str]:
    """(content, problem)."""
    stream, found = io.BufferedReader(DecompressedFile(io.BytesIO(data), kind)), b""
    try:
        while part := stream.read1(1 << 16):
            found += part
    except Damaged as error:
        return found, str(error)
    return found, stream.raw.trailing  # type: ignore[attr-defined]


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sampled_from(sorted(COMPRESS)),
    st.lists(st.tuples(st.binary(max_size=300), st.integers(1, 3000)), min_size=1, max_size=5),
    st.sampled_from([b"", b"\0", b"\0" * 512, b"\0" * 200_000, b"\r\n-- end of transfer --\r\n", b"\0\0x", b"\x1f"]),
)
def test_consecutive_members_and_trailing_data_are_read(kind: str, parts: list[tuple[bytes, int]], tail: bytes) -> None:
    content = [part * times for part, times in parts]
    found, trailing = unpacked(b"".join(map(COMPRESS[kind], content)) + tail, kind)
    assert found == b"".join(content)
    assert bool(trailing) == bool(tail.strip(b"\0"))


@pytest.mark.parametrize("kind", sorted(COMPRESS))
def test_data_before_the_damage_is_kept(kind: str) -> None:
    import random

    content = random.Random(0).randbytes(300_000)
    data = COMPRESS[kind](content)
    found, wrong = unpacked(data[: len(data) // 2], kind)
    assert content.startswith(found)
    assert len(found) > 30_000
    assert wrong == "the file ends within compressed data"


def lines(begin: int, end: int) -> bytes:
    return b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(begin, end))


def read(path: Path, reader: str = "jsonl") -> list[Piece]:
    return list(READERS[reader](File(str(path)), 1000, Columns()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "caf\udce9"])
@pytest.mark.parametrize("kind", sorted(COMPRESS))
def test_a_file_is_known_by_its_beginning(tmp_path: Path, name: str, kind: str) -> None:
    data = COMPRESS[kind](lines(0, 9)[:-1])
    assert compression_of(data) == kind
    (tmp_path / name).write_bytes(data + b"junk")
    found = read(tmp_path / name)
    assert [piece[1] for piece in found if isinstance(piece, Document)] == [f"document {i}" for i in range(9)]
    assert found[-1][1] == "malformed"


def test_a_window_of_two_gigabytes_is_read(tmp_path: Path) -> None:
    """As `zstd --long=31` writes it: here the window is what the frame's head says, byte 5 (RFC 8878, 3.1.1.1.2)."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    data = bytearray(packer.compress(lines(0, 100)) + packer.flush())
    assert data[5] == (27 - 10) << 3
    data[5] = (31 - 10) << 3
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert len(read(tmp_path / "a.jsonl.zst")) == 100


@pytest.mark.parametrize("reader", ["text", "jsonl", "html"])
def test_a_mark_is_no_text(tmp_path: Path, reader: str) -> None:
    content = {"text": "words", "jsonl": '{"text": "words"}', "html": "<p>words"}[reader]
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [piece[1] for piece in read(tmp_path / "f", reader)] == ["words"]
