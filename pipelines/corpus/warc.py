"""The reader of web archives: WARC files (ISO 28500), and WET files, which hold extracted text.

`records.py` splits the file into records, so that damage costs only its own record. `codings.py` decodes HTTP bodies,
and `web.py` extracts their text. warcio parses HTTP headers, and archives of the older ARC format.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moray.pipelines.corpus.codings import UndecodableBody, decode_body
from moray.pipelines.corpus.pieces import (
    EMPTY,
    HTTP_STATUS,
    MALFORMED,
    NOT_TEXT,
    OVERSIZED,
    Document,
    Meta,
    Piece,
    Reject,
    decode_text,
    printable,
)
from moray.pipelines.corpus.records import WarcRecord, records
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source_file import File, error_text, trailing_data, unreadable
from moray.pipelines.corpus.web import page_limit, read_page, text_of
from moray.platform.core.errors import InputError

_DOCUMENTS = ("response", "resource", "conversion")
_HEADERS = (("url", "warc-target-uri"), ("date", "warc-date"))
_HTML = ("text/html", "application/xhtml+xml")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.I)
_HEAD = 1 << 16  # bytes of HTTP headers, in addition to the longest page


def read_warc(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Reads responses with a page or plain text, resources and conversions (WET) as documents, with `url` and `date`.

    Requests, metadata and other records are skipped. The key is the record's id. A damaged record of any type counts as
    malformed, and so does each stretch between records.
    """
    try:
        stream = file.stream(resume=True)
    except OSError as error:
        yield unreadable(error)
        return
    with stream:
        beginning = _peek(stream)
        if beginning.startswith(b"filedesc:"):
            yield from _arc(stream, max_bytes)
            return
        for number, item in enumerate(records(stream, page_limit(max_bytes) + _HEAD)):
            if isinstance(item, Reject):
                yield item
            elif item.headers.get("warc-type", "").lower() in _DOCUMENTS:
                yield _guarded(item, number, max_bytes)
        yield from trailing_data(stream)


def _peek(stream: io.BufferedReader) -> bytes:
    try:
        return stream.peek(16)
    except OSError:
        return b""  # the next read raises it again


def _guarded(record: WarcRecord, number: int, max_bytes: int) -> Piece:
    """The piece of a record. Any error of a library rejects only this record."""
    key = f"#{printable(record.headers.get('warc-record-id') or number).strip('<>')}"
    try:
        piece = _piece(record, key, max_bytes)
    except InputError:
        raise
    except UndecodableBody as error:
        return Reject(key, MALFORMED, str(error))
    except Exception as error:
        return Reject(key, MALFORMED, error_text(error))
    if record.is_long and isinstance(piece, Document):  # its end was not kept
        return Reject(key, OVERSIZED, f"a record of {record.length} bytes")
    return piece


def _piece(record: WarcRecord, key: str, max_bytes: int) -> Piece:
    kind, body = record.headers.get("content-type", ""), record.body
    pairs = [(name, record.headers.get(header)) for name, header in _HEADERS]
    meta = tuple((name, printable(value).strip("<>")) for name, value in pairs if value)
    if record.headers["warc-type"].lower() == "response":
        response = _http(record)
        if response is None:
            return Reject(key, EMPTY, "not an HTTP response")
        status, headers, body = response
        if not status.startswith("2"):
            return Reject(key, HTTP_STATUS, printable(status))
        kind = next(iter(_all(headers, "content-type")), "")
    mime = kind.partition(";")[0].strip().lower()
    if mime not in (*_HTML, "text/plain", ""):
        return Reject(key, NOT_TEXT, printable(mime))
    if record.headers["warc-type"].lower() == "response":
        codings = _all(headers, "transfer-encoding"), _all(headers, "content-encoding")
        body = decode_body(body, *codings, page_limit(max_bytes))
    return _text(body, kind, record.headers["warc-type"].lower(), key, meta, max_bytes)


def _text(body: bytes, kind: str, record_type: str, key: str, meta: Meta, max_bytes: int) -> Piece:
    if record_type == "conversion":
        return decode_text(body, max_bytes, key, meta)
    match = _CHARSET.search(kind)
    charset = match.group(1) if match else ""
    if kind.strip().lower().startswith("text/plain"):
        return decode_text(text_of(body, charset).encode(), max_bytes, key, meta)
    return read_page(body, max_bytes, key, charset, meta)


Headers = list[tuple[str, str]]


def _http(record: WarcRecord) -> tuple[str, Headers, bytes] | None:
    """Status, headers and body of a response; None if it is not an HTTP response."""
    from warcio.statusandheaders import StatusAndHeadersParser

    address = record.headers.get("warc-target-uri", "http:").strip("<> ").lower()
    if not record.body or not address.startswith(("http:", "https:")):
        return None
    stream = io.BytesIO(record.body)
    head = StatusAndHeadersParser(["HTTP/1.0", "HTTP/1.1"], False).parse(stream)
    return head.get_statuscode() or "", head.headers, record.body[stream.tell() :]


def _all(headers: Headers, name: str) -> list[str]:
    return [value for key, value in headers if key.lower() == name]


def _arc(stream: io.BufferedReader, max_bytes: int) -> Iterator[Piece]:
    """The responses of an ARC file, up to the first that warcio cannot read."""
    from warcio.archiveiterator import ARCIterator

    number = -1
    try:
        for number, found in enumerate(ARCIterator(stream)):
            if found.rec_type == "response":
                yield _guarded(_of_arc(found, max_bytes), number, max_bytes)
    except InputError:
        raise
    except Exception as error:
        yield Reject("", MALFORMED, f"after record {number}: {error_text(error)}")


def _of_arc(found: Any, max_bytes: int) -> WarcRecord:
    named: Mapping[str, str | None] = {
        "warc-type": "response",
        "warc-target-uri": found.rec_headers.get_header("uri"),
        "warc-date": found.rec_headers.get_header("archive-date"),
    }
    head = found.http_headers.to_bytes() if found.http_headers else b""
    body = head + found.raw_stream.read(page_limit(max_bytes) + 1)
    return WarcRecord({name: value for name, value in named.items() if value}, body, len(body), False)
