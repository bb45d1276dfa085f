"""Readers of web pages: the main text of HTML files, and of the responses in WARC files; WET files hold text already.

resiliparse finds the main text, warcio cuts records and undoes chunks and content encodings; .gz and .zst are undone
before it, because it takes an archive that breaks off for one that ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from moray.pipelines.corpus.files import File, unreadable, words
from moray.pipelines.corpus.pieces import (
    BINARY,
    EMPTY,
    HTTP_STATUS,
    MALFORMED,
    NOT_TEXT,
    OVERSIZED,
    Meta,
    Piece,
    Reject,
    decode,
    printable,
)
from moray.pipelines.corpus.rows import Columns
from moray.platform.errors import InputError

_MARKUP = 16  # a page's markup may take this many times the bytes of the longest document, and 1 MB
_DEPTH = 1000  # elements in one another; finding the main text takes the square of it, browsers stop at 512
_TAG = re.compile(r"<(/?)(?:div|section|article|main|aside|nav|form|blockquote|center|table|ul|ol|dl)\b", re.I)
_HTML = ("text/html", "application/xhtml+xml")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.I)
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def read_html(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """A page is one document: its main text."""
    try:
        stream = file.stream()
    except OSError as error:
        yield unreadable(error)
        return
    with stream:
        try:
            data = stream.read(_page_limit(max_bytes) + 1)
        except OSError as error:
            yield file.damage(error)
            return
    yield page(data, max_bytes, "", "")


def read_warc(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """A response with a page or plain text, a resource or a conversion (WET) is a document, with `url` and `date`.

    Requests, metadata, and the like are no documents and are passed over. The key is the record's id. What is not a
    WARC record ends the file, which counts once as malformed.
    """
    from warcio.archiveiterator import ArchiveIterator

    try:
        stream = file.stream()
    except OSError as error:
        yield unreadable(error)
        return
    with stream:
        number = -1
        try:
            for number, record in enumerate(ArchiveIterator(stream)):
                if record.rec_type in _DOCUMENTS:
                    yield _record_piece(record, number, max_bytes)
                elif record.rec_type is None or _is_cut(record):
                    yield Reject(f"#{number}", MALFORMED, "the file ends within this record")
        except InputError:
            raise
        except Exception as error:  # the library's own, and whatever a torn header makes it stumble over
            yield Reject("", MALFORMED, f"after record {number}: {words(error)}" if number >= 0 else words(error))


_DOCUMENTS = ("response", "resource", "conversion")
_HEADERS = (("url", "WARC-Target-URI"), ("date", "WARC-Date"))


def _record_piece(record: Any, number: int, max_bytes: int) -> Piece:
    named = record.rec_headers.get_header("WARC-Record-ID") or str(number)
    key = f"#{printable(named).strip('<>')}"
    pairs = [(name, record.rec_headers.get_header(header)) for name, header in _HEADERS]
    meta = tuple((name, printable(value).strip("<>")) for name, value in pairs if value)
    kind = _content_type(record, key)
    if isinstance(kind, Reject):
        return kind
    limit = _page_limit(max_bytes)
    data = record.content_stream().read(limit + 1)
    if len(data) <= limit and _is_cut(record):
        return Reject(key, MALFORMED, "the file ends within this record")
    if record.rec_type == "conversion":
        return decode(data, max_bytes, key, meta)
    said = _CHARSET.search(kind)
    charset = said.group(1) if said else ""
    if kind.strip().lower().startswith("text/plain"):
        return decode(_text(data, charset).encode(), max_bytes, key, meta)
    return page(data, max_bytes, key, charset, meta)


def _content_type(record: Any, key: str) -> str | Reject:
    """What a record says that it holds, or why it is no document."""
    if record.rec_type == "response":
        if record.http_headers is None:
            return Reject(key, EMPTY, "a response without HTTP")
        status = record.http_headers.get_statuscode() or ""
        if not status.startswith("2"):
            return Reject(key, HTTP_STATUS, printable(status))
        kind = record.http_headers.get_header("Content-Type") or ""
    else:
        kind = record.rec_headers.get_header("Content-Type") or ""
    mime = kind.partition(";")[0].strip().lower()
    return kind if mime in (*_HTML, "text/plain", "") else Reject(key, NOT_TEXT, printable(mime))


def _is_cut(record: Any) -> bool:
    """Whether the stream ended before the record's Content-Length; reads what is left of the record."""
    raw = record.raw_stream
    while raw.read(1 << 16):
        pass
    return bool(getattr(raw, "limit", 0) > 0)


def page(data: bytes, max_bytes: int, key: str, charset: str, meta: Meta = ()) -> Piece:
    """The main text of a page. `charset` is what HTTP said of it, or ""."""
    if len(data) > _page_limit(max_bytes):
        return Reject(key, OVERSIZED, f"a page of more than {_page_limit(max_bytes)} bytes")
    if not data.strip():
        return Reject(key, EMPTY)
    html = _text(data, charset, is_html=True)
    if "\0" in html:
        return Reject(key, BINARY)
    if _depth(html) > _DEPTH:
        return Reject(key, MALFORMED, f"elements in one another more than {_DEPTH} deep")
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(html, main_content=True, alt_texts=False)
    if not text.strip():
        return Reject(key, EMPTY, "no main text")
    return decode(text.encode(errors="replace"), max_bytes, key, meta)


def _page_limit(max_bytes: int) -> int:
    return _MARKUP * max_bytes + (1 << 20)


def _text(data: bytes, charset: str, is_html: bool = False) -> str:
    """Bytes as a browser would read them: by a mark at their begin, HTTP, the page's own word, or by their look."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    marked = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    chosen = marked or (map_encoding_to_html5(charset, False) if charset else None)
    chosen = chosen or detect_encoding(data, from_html_meta=is_html)
    return str(bytes_to_str(data, chosen or "utf-8", errors="replace")).encode(errors="replace").decode()


def _depth(html: str) -> int:
    """How deep blocks lie in one another, by their tags; 0 where there are too few to matter."""
    if html.count("<") <= _DEPTH:
        return 0
    depth = deepest = 0
    for tag in _TAG.finditer(html):
        depth += -1 if tag.group(1) else 1
        deepest = max(deepest, depth)
    return deepest
