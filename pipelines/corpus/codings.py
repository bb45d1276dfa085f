"""What HTTP did to a body on its way, undone: chunks, and the content and transfer codings of RFC 9110 and RFC 9659.

Never past a limit of bytes. A body that is not in the coding that its headers say stays as it is if it looks like text,
and one in a coding that nobody knows if it looks like markup; else it is refused by the name of the coding, so that no
compressed bytes become a document.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable

from moray.pipelines.corpus.unpack import Decoder, decoder, unpacking_errors

Undo = Callable[[bytes, int], bytes]
_NONE = frozenset({"identity", "none", "plain", "text", "binary", "raw", "7bit", "8bit", "text/html"})
_LOOK = 2048  # bytes by which text is told from what is none
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b")  # ESC stands in texts of ISO-2022


class NotUndone(ValueError):
    """A body in a coding that is not known, or that it is not in."""


def undo(body: bytes, transfer: Iterable[str], content: Iterable[str], limit: int) -> bytes:
    """The body without its codings, which were applied in the order of their names; at most limit + 1 bytes of it.
    Raises NotUndone."""
    for name in reversed([*_names(content), *_names(transfer)]):
        body = _without(body, name, limit)
    return body


def _names(headers: Iterable[str]) -> list[str]:
    return [name.strip().lower() for value in headers for name in value.split(",") if name.strip()]


def _without(body: bytes, name: str, limit: int) -> bytes:
    if name in _NONE or _is_charset(name):
        return body
    undo_one = _UNDO.get(name)
    try:
        if undo_one is not None and (found := undo_one(body, limit + 1)):
            return found
    except NotUndone:
        raise
    except Exception:  # of whatever library: then it is not in that coding
        pass
    if _looks_like_text(body) and (name in _UNDO or body.lstrip().startswith(b"<")):
        return body
    raise NotUndone(f"the coding {name[:40]!r} is {'not what the body is in' if name in _UNDO else 'not known'}")


def _is_charset(name: str) -> bool:
    """What servers say by mistake where a coding should stand."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    return map_encoding_to_html5(name, False) is not None


def _looks_like_text(body: bytes) -> bool:
    """Whether its beginning has no control characters but those of texts. UTF-16 has NULs, as half of its bytes."""
    look = body[:_LOOK]
    odd = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in look)
    return not odd or look.count(0) == odd > len(look) // 4


def _chunked(body: bytes, size: int) -> bytes:
    from warcio.bufferedreaders import ChunkedDataReader

    return bytes(ChunkedDataReader(io.BytesIO(body)).read(size))


def _unzip(body: bytes, size: int) -> bytes:
    return _members("gzip", body, size)


def _zstd(body: bytes, size: int) -> bytes:
    return _members("zstd", body, size)


def _members(kind: str, body: bytes, size: int) -> bytes:
    """What came before any damage, which a body that broke off has at its end."""
    found = b""
    while body and len(found) < size:
        one = decoder(kind)
        part = _drained(one, body, size - len(found))
        found += part
        body = one.unused_data if one.eof and part else b""
    return found


def _drained(one: Decoder, body: bytes, size: int) -> bytes:
    found = []
    try:
        while size > 0 and (part := one.decompress(body, size)):
            found.append(part)
            size -= len(part)
            body = b""
            if one.eof or one.needs_input:
                break
    except unpacking_errors():
        if not found:
            raise
    return b"".join(found)


def _deflate(body: bytes, size: int) -> bytes:
    """In zlib's form, as the standard has it, or bare, as some servers do."""
    try:
        return zlib.decompressobj().decompress(body, size)
    except zlib.error:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, size)


def _brotli(body: bytes, size: int) -> bytes:
    try:
        import brotli
    except ImportError as error:  # it comes with resiliparse
        raise NotUndone("the coding 'br' needs the package brotli: pip install brotli") from error
    one = brotli.Decompressor()
    return bytes(one.process(body, output_buffer_limit=size))[:size]


_UNDO: dict[str, Undo] = {
    "chunked": _chunked, "gzip": _unzip, "x-gzip": _unzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd,
}  # fmt: skip
