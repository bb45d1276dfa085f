"""Web pages: the main text of HTML, extracted by resiliparse, decoded in the charset that a browser would use."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moray.pipelines.corpus.extractor_process import ExtractionFailed, main_text
from moray.pipelines.corpus.markup import complexity_problem
from moray.pipelines.corpus.pieces import BINARY, EMPTY, MALFORMED, OVERSIZED, Meta, Piece, Reject, decode_text
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source_file import File, error_text, trailing_data, unreadable

_MARKUP = 16  # a page may have this many times the bytes of the longest document, plus 1 MB
_PRESCAN = 1024  # leading bytes of a page in which it may declare its charset
_NAMED = re.compile(rb"<meta[^>]*?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def read_html(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Reads a page as one document, its main text."""
    try:
        stream = file.stream()
    except OSError as error:
        yield unreadable(error)
        return
    with stream:
        try:
            data = stream.read(page_limit(max_bytes) + 1)
        except OSError as error:
            yield file.damage(error)
            return
        yield read_page(data, max_bytes, "", "")
        yield from trailing_data(stream)


def read_page(data: bytes, max_bytes: int, key: str, charset: str, meta: Meta = ()) -> Piece:
    """The main text of a page. charset: the one declared by HTTP, or ""."""
    if len(data) > page_limit(max_bytes):
        return Reject(key, OVERSIZED, f"a page of more than {page_limit(max_bytes)} bytes")
    if not data.strip():
        return Reject(key, EMPTY)
    html = text_of(data, charset, is_html=True)
    if "\0" in html:
        return Reject(key, BINARY)
    text = _main_text(html, key)
    return text if isinstance(text, Reject) else decode_text(text.encode(errors="replace"), max_bytes, key, meta)


def _main_text(html: str, key: str) -> str | Reject:
    if reason := complexity_problem(html):
        return Reject(key, MALFORMED, reason)
    try:
        text = main_text(html)
    except ExtractionFailed as error:
        return Reject(key, MALFORMED, error_text(error))
    return text if text.strip() else Reject(key, EMPTY, "no main text")


def page_limit(max_bytes: int) -> int:
    return _MARKUP * max_bytes + (1 << 20)


def text_of(data: bytes, charset: str, is_html: bool = False) -> str:
    """Decodes bytes as a browser would: by byte order mark, or else HTTP, the page's declaration, or detection."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    marked = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    chosen = marked or (map_encoding_to_html5(_known(charset), False) if charset else None)
    if is_html and not marked:
        chosen = _charset_of_page(data, chosen)
    chosen = chosen or detect_encoding(data, from_html_meta=is_html)
    return str(bytes_to_str(data, chosen or "utf-8", errors="replace")).encode(errors="replace").decode()


def _charset_of_page(data: bytes, declared: str | None) -> str | None:
    """The charset of a page without a byte order mark. declared: the one declared by HTTP.

    If the tags are readable as ASCII, the page is not in UTF-16, even if it is declared so: the HTML standard (prescan,
    13.2.3.2) then requires UTF-8, and windows-1252 for x-user-defined.
    """
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    if declared is None and (named := _NAMED.search(data[:_PRESCAN])):
        label = _known(named.group(1).decode())
        declared = map_encoding_to_html5(label, False) if label != named.group(1).decode() else None
    charset = declared or detect_encoding(data, from_html_meta=True)
    if charset and charset.startswith("utf-16") and b"<\0" not in data and b"\0<" not in data:
        return "utf-8"
    return charset


def _known(label: str) -> str:
    """The label, with windows-1252 in place of x-user-defined, as in the HTML standard."""
    return "windows-1252" if label.strip().lower() == "x-user-defined" else label
