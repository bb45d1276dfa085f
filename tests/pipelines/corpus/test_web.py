"""Web archives and pages: the main text as it was meant, whatever its encoding, and nothing raises."""

from __future__ import annotations

import gzip
import random
import resource
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moray.pipelines.corpus import extractor_process, markup
from moray.pipelines.corpus.pieces import REASONS, Document, Piece, Reject
from moray.pipelines.corpus.readers import READERS
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source_file import File
from moray.pipelines.corpus.web import read_page
from tests.examples import examples
from tests.pipelines.corpus.archives import PAGE, record, response, zipped


def read(path: Path, reader: str = "warc", max_bytes: int = 100_000) -> list[Piece]:
    return list(READERS[reader](File(str(path)), max_bytes, Columns()))


def written(folder: Path, data: bytes, name: str = "a.warc") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


RECORDS = [
    record("warcinfo", b"software: x\r\n", 0, "application/warc-fields"),
    record("request", b"GET / HTTP/1.1\r\nHost: site.example\r\n\r\n", 1, "application/http; msgtype=request"),
    response(PAGE.format(name="ships").encode(), 2),
    response(b"\x89PNG\r\n\x1a\n", 3, "image/png"),
    response(b"<p>gone</p>", 4, status="404 Not Found"),
    response(b"", 5),
    response("just text, \xe4".encode("latin-1"), 6, "text/plain; charset=iso-8859-1"),
    record("revisit", b"HTTP/1.1 200 OK\r\n\r\n", 7, "application/http; msgtype=response"),
    record("metadata", b"fetchTimeMs: 1\r\n", 8, "application/warc-fields"),
    record("response", b"", 9, "application/http; msgtype=response"),
]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_a_warc_gives_pages_with_address_and_date(tmp_path: Path, name: str) -> None:
    plain = b"".join(RECORDS)
    data = {"a.warc": plain, "a.warc.gz": zipped(RECORDS), "a.warc.zst": pa.compress(plain, "zstd", asbytes=True)}[name]
    found = read(written(tmp_path, data, name))
    first, *others = found
    assert isinstance(first, Document)
    assert first.key == "#urn:uuid:2"
    assert first.text.startswith("On ships\n\nThe first paragraph")
    assert "Home" not in first.text
    assert "hidden" not in first.text
    assert first.meta == (("url", "http://site.example/2"), ("date", "2024-01-02T03:04:05Z"))
    assert [(piece.key, piece.reason if isinstance(piece, Reject) else piece.text) for piece in others] == [
        ("#urn:uuid:3", "not_text"),
        ("#urn:uuid:4", "http_status"),
        ("#urn:uuid:5", "empty"),
        ("#urn:uuid:6", "just text, ä"),
        ("#urn:uuid:9", "empty"),
    ]
    assert [piece.detail for piece in others if isinstance(piece, Reject)][:2] == ["image/png", "404"]


def test_a_wet_file_holds_text_already(tmp_path: Path) -> None:
    texts = ("schön <b>".encode(), b"\xff\xfe\xfd", b" ")
    records = [record("conversion", text, number, "text/plain") for number, text in enumerate(texts)]
    found = read(written(tmp_path, zipped(records), "a.warc.wet.gz"))
    assert [piece[:2] for piece in found] == [
        ("#urn:uuid:0", "schön <b>"),
        ("#urn:uuid:1", "not_utf8"),
        ("#urn:uuid:2", "empty"),
    ]


def test_bodies_are_unpacked_as_http_sent_them(tmp_path: Path) -> None:
    body = PAGE.format(name="parcels").encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:99], body[99:])) + b"0\r\n\r\n"
    records = [
        response(gzip.compress(body), 1, more="Content-Encoding: gzip\r\n"),
        response(chunks, 2, more="Transfer-Encoding: chunked\r\n"),
        response(gzip.compress(b"<p>x" * 50_000_000), 3, more="Content-Encoding: gzip\r\n"),
    ]
    one, other, bomb = read(written(tmp_path, b"".join(records)))
    assert one[1] == other[1]
    assert "what parcels is about" in one[1]
    assert isinstance(bomb, Reject)
    assert bomb.reason == "oversized"


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_that_breaks_off_says_so_once(tmp_path: Path, cut: float, packed: bool) -> None:
    noise = random.Random(0)
    records = [response(PAGE.format(name=noise.randbytes(9000).hex()).encode(), i) for i in range(60)]
    data = zipped(records) if packed else b"".join(records)
    found = read(written(tmp_path, data[: int(len(data) * cut)], "a.warc.gz" if packed else "a.warc"))
    assert [piece.reason for piece in found if isinstance(piece, Reject)] == ["malformed"]
    assert isinstance(found[-1], Reject)
    assert len(found) == pytest.approx(60 * cut, abs=5), "at most a buffer is lost"


@pytest.mark.parametrize(
    "data",
    [b"no archive at all\r\n" * 9, b"WARC/1.0\r\n\r\n", b"WARC/1.0\r\nWARC-Type: response\r\n\r\nabc\r\n\r\n",
     record("response", b"HTTP/1.1 200 OK\r\n\r\nx", length=-5),
     record("response", b"HTTP/1.1 200 OK\r\n\r\nx", length=10**18),
     RECORDS[2].replace(b"HTTP/1.1 200 OK", b"garbage \xff\x00")],
)  # fmt: skip
def test_records_that_are_none_are_counted(tmp_path: Path, data: bytes) -> None:
    found = read(written(tmp_path, data))
    assert found
    assert all(isinstance(piece, Reject) for piece in found)


TEXTS = {
    "utf-8": "Grüße, 日本語 и русский",
    "utf-16-le": "Grüße, 日本語 и русский",
    "utf-16-be": "Grüße, 日本語 и русский",
    "iso-8859-1": "Grüße aus Köln",
    "iso-8859-2": "Zażółć gęślą jaźń",
    "iso-8859-7": "ελληνικό κείμενο",
    "windows-1251": "русский текст",
    "windows-1252": "Grüße, „Köln“ €",
    "windows-1255": "טקסט בעברית",
    "koi8-r": "русский текст",
    "shift_jis": "日本語の文章です",
    "euc-jp": "日本語の文章です",
    "euc-kr": "한국어 문장입니다",
    "gb18030": "简体中文的句子",
    "big5": "繁體中文的句子",
}


NAMED = [(charset, "http") for charset in TEXTS]
NAMED += [(charset, "mark" if charset.startswith("utf") else "page") for charset in TEXTS]  # UTF-16 hides a page's word


@pytest.mark.parametrize(("charset", "said_by"), [*NAMED, ("utf-8", "page")])
def test_every_charset_that_is_named_is_read(charset: str, said_by: str) -> None:
    meta = f'<meta charset="{charset}">' if said_by == "page" else ""
    html = PAGE.format(name=TEXTS[charset]).replace("<head>", f"<head>{meta}")
    mark = "\ufeff".encode(charset) if said_by == "mark" else b""
    piece = read_page(mark + html.encode(charset), 10_000, "", charset.upper() if said_by == "http" else "")
    assert isinstance(piece, Document)
    assert f"it says what {TEXTS[charset]} is about" in piece.text


@pytest.mark.parametrize("charset", ["utf-8", "windows-1251", "shift_jis", "gb18030"])
def test_an_undeclared_charset_is_detected(charset: str) -> None:
    html = PAGE.format(name=f"{TEXTS[charset]}. " * 20)
    piece = read_page(html.encode(charset), 100_000, "", "no-such-charset")
    assert isinstance(piece, Document)
    assert TEXTS[charset] in piece.text


def test_html_files_are_pages(tmp_path: Path) -> None:
    found = read(written(tmp_path, gzip.compress(PAGE.format(name="files").encode()), "a.html.gz"), "html")
    assert found[0][1].startswith("On files")
    cases = {b"": "empty", b"<script>x</script>": "empty", b"<p>a\0b": "binary", b"<div>" * 3000 + b"x": "malformed",
             b"<p>" + b"x" * 2001: "oversized", b" " * 2_000_000: "oversized"}  # fmt: skip
    for data, reason in cases.items():
        (piece,) = read(written(tmp_path, data, "b.html"), "html", max_bytes=2000)
        assert isinstance(piece, Reject)
        assert piece.reason == reason, data[:20]


# What parsers take more than linear time for, in sizes that would take this one from ten seconds to an hour.
HOSTILE = {
    "styles never ended": "".join(f"<p><font color=#{i:06x}>line {i}" for i in range(12_000)),
    "styles in one another": "".join(f"<b id={i}><i id=x{i}>" for i in range(40_000)),
    "styles, ends of others": "".join(f"</q><p></q><font size={i}>line {i}" for i in range(8_000)),
    "attributes": "<div " + " ".join(f"a{i}=1" for i in range(90_000)) + ">x",
    "options": "<select>" + "<option>a" * 90_000,
    "ends before begins": "</div>" * 30_000 + "<div>" * 30_000 + "words",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_page_takes_more_than_its_time_and_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the parser makes of it, a page that is made badly costs itself, and the next one is read."""
    monkeypatch.setattr(extractor_process, "SECONDS", 0.2)
    monkeypatch.setattr(extractor_process, "SECONDS_PER_MB", 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF)
    piece = read_page(HOSTILE[kind].encode(), 10_000_000, "k", "")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert isinstance(piece, Reject)
    assert (piece.key, piece.reason) == ("k", "malformed")
    assert piece.detail
    assert after.ru_maxrss - before.ru_maxrss < 300_000, "KB: what the parser holds is not held here"
    assert isinstance(read_page(PAGE.format(name="what comes after").encode(), 10_000, "", ""), Document)


def test_a_page_gives_the_same_text_here_and_apart() -> None:
    html = PAGE.format(name="places").replace("</article>", "<p>A further paragraph is here.</p>" * 3000 + "</article>")
    assert extractor_process.extractor().main_text(html) == extractor_process.extract(html)
    assert extractor_process.main_text(html) == extractor_process.extract(html)


def test_a_dead_child_process_loses_one_page_and_is_replaced() -> None:
    extractor = extractor_process.Extractor()
    assert "words" in extractor.main_text("<p>words")
    child = extractor._running()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert "others" in extractor.main_text("<p>others")
    extractor.close()


TAGS = ["<div>", "</div>", "<p>", "<font>", "</font>", "<b x=1>", "</b>", "<br>", "text", "</ul>", "<ul>"]


@given(st.lists(st.sampled_from(TAGS), max_size=200))
def test_the_depth_of_blocks_is_that_of_a_stack(tags: list[str]) -> None:
    depth = deepest = 0
    for tag in tags:
        depth = depth + 1 if tag in ("<div>", "<ul>") else max(0, depth - 1) if tag in ("</div>", "</ul>") else depth
        deepest = max(deepest, depth)
    assert markup._depth("".join(tags)) == deepest


def test_a_long_page_that_is_well_made_is_read() -> None:
    for body in ("<p><b>word</b> <a href=x>link</a></p>" * 20_000, "<p>no ends <br>" * 20_000, "<li><i>x</i>" * 20_000):
        assert not markup.complexity_problem(body)
        assert isinstance(read_page(body.encode(), 10_000_000, "", ""), Document)


@settings(max_examples=examples(150))
@given(st.data())
def test_whatever_happens_to_an_archive_nothing_raises_and_all_is_counted(data: st.DataObject) -> None:
    """Bytes changed, dropped or doubled anywhere in a WARC file."""
    import tempfile

    content = bytearray(b"".join(RECORDS))
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, len(content)))
        end = min(len(content), at + data.draw(st.integers(0, 300)))
        content[at:end] = data.draw(st.one_of(st.binary(max_size=20), st.just(bytes(content[at:end]) * 2)))
    with tempfile.TemporaryDirectory() as folder:
        found = read(written(Path(folder), bytes(content)))
    counts = Counter(piece.reason for piece in found if isinstance(piece, Reject))
    assert set(counts) <= set(REASONS)
    for piece in found:
        if isinstance(piece, Document):
            piece.text.encode()


MARKUP = ["<div>", "</div>", "<table>", "<tr>", "<td>", "<svg>", "<!--", "-->", "<p", ">", "&#0;", "&#xFFFFFFFFF;"]
MARKUP += ["<template>", "</body>", "<article>", "<ul><li>", "<script>", "<![CDATA[", "<pre>", "\ufeff"]


@settings(max_examples=examples(100))
@example(["\x1f<?"], "utf-8")
@given(
    st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=8)), max_size=60),
    st.sampled_from(["utf-8", "utf-16-le", "latin-1", "shift_jis"]),
)
def test_any_markup_gives_text_or_a_reason(parts: list[str], charset: str) -> None:
    piece = read_page("".join(parts).encode(charset, "replace"), 1000, "k", charset)
    if isinstance(piece, Document):
        assert piece.text.strip(), "neither nothing nor blanks of Unicode alone"
        assert len(piece.text.encode()) <= 1000
    else:
        assert piece.reason in REASONS
