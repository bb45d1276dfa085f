"""Damaged WARC files: damage costs only its own record, and every loss is reported."""

from __future__ import annotations

import gzip
import re
import tempfile
import zlib
from pathlib import Path

import brotli
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.corpus.codings import UndecodableBody, decode_body
from moray.pipelines.corpus.pieces import Document, Piece, Reject
from moray.pipelines.corpus.readers import READERS
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source_file import File
from tests.examples import examples
from tests.pipelines.corpus.archives import PAGE, record, response, zipped

COUNT = 12
GOOD = [response(PAGE.format(name=f"thing {i}").encode(), i) for i in range(COUNT)]


def read(data: bytes, name: str = "a.warc", max_bytes: int = 100_000) -> list[Piece]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return list(READERS["warc"](File(str(path)), max_bytes, Columns()))


def keys(pieces: list[Piece], kind: type = Document) -> list[str]:
    return [piece.key for piece in pieces if isinstance(piece, kind)]


def longer(item: bytes, by: int) -> bytes:
    return re.sub(rb"Content-Length: (\d+)", lambda m: b"Content-Length: %d" % (int(m[1]) + by), item, count=1)


PACKED = {
    "a.warc": b"".join,
    "a.warc.gz": zipped,
    "one.warc.gz": lambda items: gzip.compress(b"".join(items)),
    "a.warc.zst": lambda items: zstd.compress(b"".join(items)),
    "blocks.warc.gz": lambda items: b"".join(
        gzip.compress(b"".join(items)[i : i + 500]) for i in range(0, len(b"".join(items)), 500)
    ),
}


@settings(max_examples=examples(80), deadline=None)
@given(
    st.dictionaries(st.integers(0, COUNT - 2), st.sampled_from([-300, -5, 5, 70, 900, 5_000_000, 10**18]), max_size=4),
    st.booleans(),
    st.sampled_from(sorted(PACKED)),
)
def test_a_wrong_length_or_a_missing_blank_line_affects_no_other_record(
    wrong: dict[int, int], blank: bool, name: str
) -> None:
    items = [longer(item, wrong.get(i, 0)) for i, item in enumerate(GOOD)]
    found = read(PACKED[name]([item if blank else item.removesuffix(b"\r\n\r\n") for item in items]), name)
    assert keys(found) == [f"#urn:uuid:{i}" for i in range(COUNT) if i not in wrong]
    assert keys(found, Reject) == [f"#urn:uuid:{i}" for i in sorted(wrong)]
    assert all(piece.reason == "malformed" for piece in found if isinstance(piece, Reject))


@settings(max_examples=examples(60), deadline=None)
@given(st.dictionaries(st.integers(0, COUNT - 2), st.sampled_from(["flip", "head", "sum", "cut"]), max_size=4))
def test_a_damaged_gzip_member_affects_only_its_record(how: dict[int, str]) -> None:
    members = [bytearray(gzip.compress(item)) for item in GOOD]
    for i, kind in how.items():
        if kind == "cut":
            del members[i][len(members[i]) // 2 :]
        else:
            members[i][{"flip": 60, "head": 3, "sum": -6}[kind]] ^= 0xFF
    found = read(b"".join(map(bytes, members)), "a.warc.gz")
    assert keys(found) == [f"#urn:uuid:{i}" for i in range(COUNT) if i not in how]
    assert len(keys(found, Reject)) == len(how)


def test_data_between_records_is_counted_at_its_offset() -> None:
    found = read(b"\r\n" + GOOD[0] + b"no record\nat all\n" * 9000 + GOOD[1] + b"-- the end --")
    assert keys(found) == ["#urn:uuid:0", "#urn:uuid:1"]
    details = [piece.detail for piece in found if isinstance(piece, Reject)]
    assert details[0].startswith(f"{9000 * 17} bytes at offset {len(GOOD[0]) + 2} are not a record: 'no record")
    assert details[1].startswith("13 bytes at offset")


def test_a_record_within_a_record_is_no_record() -> None:
    inner = record("resource", b"".join(GOOD), 99, "application/warc")
    found = read(inner + GOOD[0])
    assert keys(found) == ["#urn:uuid:0"]
    assert keys(found, Reject) == ["#urn:uuid:99"]
    long = record("resource", b"x" * 1_500_000 + GOOD[1] + b"x" * 2_000_000, 98, "application/warc")
    assert keys(read(long + GOOD[0], max_bytes=100_000)) == ["#urn:uuid:0"]


def test_versions_and_line_ends_are_read_as_they_come() -> None:
    data = b"".join(GOOD[:3])
    assert len(keys(read(data.replace(b"WARC/1.0", b"WARC/1.2")))) == 3
    bare = [item.partition(b"\r\n\r\n") for item in GOOD[:3]]
    assert len(keys(read(b"".join(head.replace(b"\r\n", b"\n") + b"\n\n" + body for head, _, body in bare)))) == 3


def test_an_older_archive_is_read_too() -> None:
    head = b"1 0 X\nURL IP-address Archive-date Content-type Archive-length\n"
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + PAGE.format(name="ages").encode()
    data = b"filedesc://x.arc 0.0.0.0 20080430204825 text/plain %d\n%s\n" % (len(head), head)
    data += b"http://a.example/ 1.2.3.4 20080430204825 text/html %d\n%s\n" % (len(body), body)
    (piece,) = read(data, "a.arc")
    assert isinstance(piece, Document)
    assert dict(piece.meta)["url"] == "http://a.example/"


# Codings

BODY = PAGE.format(name="parcels").encode()


def chunks(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


CODED = {
    "br": (["br"], [], brotli.compress(BODY)),
    "zstd": (["zstd"], [], zstd.compress(BODY)),
    "gzip": (["GZIP"], [], gzip.compress(BODY)),
    "x-gzip": (["x-gzip"], [], gzip.compress(BODY)),
    "twice": (["gzip, br"], [], brotli.compress(gzip.compress(BODY))),
    "two headers": (["gzip", "identity"], [], gzip.compress(BODY)),
    "zlib": (["deflate"], [], zlib.compress(BODY)),
    "bare deflate": (["deflate"], [], zlib.compress(BODY)[2:-4]),
    "on the way": ([], ["gzip, chunked"], chunks(gzip.compress(BODY))),
    "both": (["gzip"], ["chunked"], chunks(gzip.compress(BODY))),
    "said, but is not": (["gzip", "br", "zstd", "deflate"], ["chunked"], BODY),
    "no coding at all": (["none"], [], BODY),
    "a charset": (["UTF-8"], [], BODY),
}


@pytest.mark.parametrize("kind", CODED)
def test_codings_are_undone_and_every_record_is_read(kind: str) -> None:
    content, transfer, body = CODED[kind]
    assert decode_body(body, transfer, content, 1 << 20) == BODY
    more = "".join(f"Content-Encoding: {value}\r\n" for value in content)
    more += "".join(f"Transfer-Encoding: {value}\r\n" for value in transfer)
    found = read(GOOD[0] + response(body, 50, more=more) + GOOD[1])
    assert keys(found) == ["#urn:uuid:0", "#urn:uuid:50", "#urn:uuid:1"]


@pytest.mark.parametrize("name", ["compress", "exi", "br", "gzip", "zstd", "deflate", "dcb"])
@given(noise=st.binary(min_size=200, max_size=400))
@settings(max_examples=examples(20))
def test_no_compressed_bytes_become_a_document(name: str, noise: bytes) -> None:
    body = b"\x1f\x9d\x90" + noise
    found = read(response(body, 7, more=f"Content-Encoding: {name}\r\n") + GOOD[1])
    assert keys(found) == ["#urn:uuid:1"]
    (reject,) = (piece for piece in found if isinstance(piece, Reject))
    assert repr(name) in reject.detail or reject.reason == "empty"


@pytest.mark.parametrize("kind", ["gzip", "br", "zstd", "deflate"])
def test_a_body_that_unfolds_stops_at_the_limit(kind: str) -> None:
    pack = {"gzip": gzip.compress, "br": brotli.compress, "zstd": zstd.compress, "deflate": zlib.compress}[kind]
    body = pack(b"a" * 30_000_000)
    assert decode_body(body, [], [kind], 1000) == b"a" * 1001
    with pytest.raises(UndecodableBody, match="unknown coding 'exi'"):
        decode_body(b"\0\1\2" * 99, [], ["exi"], 1000)


@pytest.mark.parametrize("by", [10**18, 5_000_000, -50])
def test_records_that_are_all_wrong_take_linear_time(by: int) -> None:
    """Each seems to reach over all that follow it: 30,000 of them, of which each byte is looked at a few times only."""
    wrong = [longer(response(b"<p>some words of a page that is here</p>", i), by) for i in range(30_000)]
    found = read(b"".join(wrong) + GOOD[0])
    assert keys(found) == ["#urn:uuid:0"]
    assert len(keys(found, Reject)) == 30_000
    folded = b"WARC/1.0\r\nWARC-Type: response\r\n" + b" x\r\n" * 200_000 + b"\r\n"
    assert keys(read(folded + GOOD[0])) == ["#urn:uuid:0"]
