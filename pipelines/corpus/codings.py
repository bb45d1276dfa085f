"""Decodes HTTP bodies: chunks, and the content and transfer codings of RFC 9110 and RFC 9659.

The output never exceeds a limit of bytes. A body that is not in the declared coding is returned unchanged if it looks
like text. A body in an unknown coding is returned unchanged if it looks like markup. Otherwise the body is refused with
the name of the coding, so that no compressed bytes become a document.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable

from moray.pipelines.corpus.unpack import Decoder, decoder, decompression_errors

Decode = Callable[[bytes, int], bytes]  # (body, maximum number of bytes) -> decoded body
_NONE = frozenset({"identity", "none", "plain", "text", "binary", "raw", "7bit", "8bit", "text/html"})
_SNIFFED = 2048  # leading bytes that decide whether a body looks like text
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b")  # ISO-2022 text contains ESC


class UndecodableBody(ValueError):
    """The coding of a body is unknown, or the body is not in the declared coding."""


def decode_body(body: bytes, transfer: Iterable[str], content: Iterable[str], limit: int) -> bytes:
    """At most limit + 1 bytes of the decoded body. Codings are listed in the order in which they were applied.

    Raises UndecodableBody.
    """
    for name in reversed([*_names(content), *_names(transfer)]):
        body = _decode_one(body, name, limit)
    return body


def _names(headers: Iterable[str]) -> list[str]:
    return [name.strip().lower() for value in headers for name in value.split(",") if name.strip()]


def _decode_one(body: bytes, name: str, limit: int) -> bytes:
    if name in _NONE or _is_charset(name):
        return body
    decode = _DECODERS.get(name)
    try:
        if decode is not None and (decoded := decode(body, limit + 1)):
            return decoded
    except UndecodableBody:
        raise
    except Exception:  # any library error means that the body is not in this coding
        pass
    if _looks_like_text(body) and (decode is not None or body.lstrip().startswith(b"<")):
        return body
    problem = "unknown coding" if decode is None else "the body is not in the coding"
    raise UndecodableBody(f"{problem} {name[:40]!r}")


def _is_charset(name: str) -> bool:
    """Whether the name is a charset, which some servers send in place of a coding."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    return map_encoding_to_html5(name, False) is not None


def _looks_like_text(body: bytes) -> bool:
    """Whether the leading bytes hold no control characters except those of text, or are UTF-16 (many NUL bytes)."""
    prefix = body[:_SNIFFED]
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in prefix)
    return not controls or prefix.count(0) == controls > len(prefix) // 4


def _chunked(body: bytes, size: int) -> bytes:
    from warcio.bufferedreaders import ChunkedDataReader

    return bytes(ChunkedDataReader(io.BytesIO(body)).read(size))


def _gunzip(body: bytes, size: int) -> bytes:
    return _members("gzip", body, size)


def _zstd(body: bytes, size: int) -> bytes:
    return _members("zstd", body, size)


def _members(kind: str, body: bytes, size: int) -> bytes:
    """The content before the first damage, such as the end of a truncated body."""
    content = b""
    while body and len(content) < size:
        member = decoder(kind)
        part = _read_member(member, body, size - len(content))
        content += part
        body = member.unused_data if member.eof and part else b""
    return content


def _read_member(member: Decoder, body: bytes, size: int) -> bytes:
    parts = []
    try:
        while size > 0 and (part := member.decompress(body, size)):
            parts.append(part)
            size -= len(part)
            body = b""
            if member.eof or member.needs_input:
                break
    except decompression_errors():
        if not parts:
            raise
    return b"".join(parts)


def _deflate(body: bytes, size: int) -> bytes:
    """With a zlib header, as the standard requires, or raw, as some servers send it."""
    try:
        return zlib.decompressobj().decompress(body, size)
    except zlib.error:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, size)


def _brotli(body: bytes, size: int) -> bytes:
    try:
        import brotli
    except ImportError as error:  # resiliparse depends on it
        raise UndecodableBody("the coding 'br' needs the package brotli: pip install brotli") from error
    decompressor = brotli.Decompressor()
    return bytes(decompressor.process(body, output_buffer_limit=size))[:size]


_DECODERS: dict[str, Decode] = {
    "chunked": _chunked, "gzip": _gunzip, "x-gzip": _gunzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd,
}  # fmt: skip
