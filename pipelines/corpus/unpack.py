"""Decompresses gzip and zstd files as completely as their own tools: several members, zero padding after the last one,
and windows of up to 2 GB.

Damage within a member is an error, raised after the content before it. Other data after the last member is not an
error: the content is complete, and `trailing` describes the data. This module uses Python's own libraries, because
Arrow's streams do not report member boundaries, treat padding as damage and support windows up to 128 MB only.
"""

from __future__ import annotations

import io
import zlib
from typing import Any, Protocol

_CHUNK = 1 << 16  # compressed bytes per read
_PART = 1 << 20  # decompressed bytes per step
_LOG_WINDOW = 31  # 2 GB, the maximum of `zstd --long=31`; the reader needs as much memory
_GZIP = b"\x1f\x8b\x08"
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16)))  # frames, skippable frames


class Damaged(OSError):
    """A compressed file is truncated or corrupt."""


def compression_of(beginning: bytes) -> str:
    """'gzip' or 'zstd' by the magic bytes of a file; '' for neither."""
    if beginning.startswith(_GZIP):
        return "gzip"
    return "zstd" if beginning[:4] in _ZSTD else ""


class Decoder(Protocol):
    """Decompressor of one member, with the interface of `zstd` and `bz2` in the standard library."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib with the `Decoder` interface."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        found = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = not self._zlib.unconsumed_tail and len(found) < max_length
        return found


def decoder(kind: str) -> Decoder:
    """A decoder of 'gzip' or 'zstd'. It raises the types of `decompression_errors`."""
    if kind == "gzip":
        return _Gzip()
    from backports import zstd

    made: Decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _LOG_WINDOW})
    return made


def decompression_errors() -> tuple[type[Exception], ...]:
    from backports import zstd

    return zlib.error, zstd.ZstdError, MemoryError, EOFError


class DecompressedFile(io.RawIOBase):
    """The content of a compressed file. Raises Damaged, and the errors of `source`.

    resume: damage ends only its member, and reading continues with the next member.
    boundaries: offsets in the content at which members begin, except the first. damages: (offset, reason) of each
    damaged member; the offset is also a boundary. trailing: a description of the data after the last member, '' for
    nothing or zeros.
    """

    def __init__(self, source: Any, kind: str, resume: bool = False) -> None:
        self._source, self._kind, self._resume = source, kind, resume
        self._decoder: Decoder | None = None
        self._chunk = b""  # compressed bytes not yet passed to the decoder
        self._given = b""  # the last bytes passed to it, in which the next member may begin
        self._ended = False
        self._made = self._members = 0
        self.boundaries: list[int] = []
        self.damages: list[tuple[int, str]] = []
        self.trailing = ""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        while not self._ended:
            if found := self._next(min(_PART, len(target))):
                target[: len(found)] = found
                self._made += len(found)
                return len(found)
        return 0

    def _next(self, size: int) -> bytes:
        """The next bytes of the content; empty at a boundary, or if more compressed bytes must be read first."""
        if self._decoder is None and not self._begin():
            return b""
        assert self._decoder is not None
        if self._decoder.needs_input:
            if not self._chunk and not self._more():
                self._give_up("the file ends within compressed data")
                return b""
            self._given, self._chunk = self._chunk, b""
            return self._decode(self._decoder, self._given, size)
        return self._decode(self._decoder, b"", size)

    def _decode(self, decoder: Decoder, data: bytes, size: int) -> bytes:
        try:
            found = decoder.decompress(data, size)
        except decompression_errors() as error:
            self._give_up(str(error) or type(error).__name__)
            return b""
        if decoder.eof:
            self._chunk = decoder.unused_data
            self._decoder = None
        return found

    def _begin(self) -> bool:
        """Starts the next member. False at the end of the file."""
        while True:
            if self._members:
                self._chunk = self._chunk.lstrip(b"\0")
            if len(self._chunk) >= 4 or not self._more():
                break
        if self._members and not self._chunk:
            self._ended = True
        elif self._members and compression_of(self._chunk) != self._kind:
            self.trailing = f"unexpected data after the last compressed member: {self._chunk[:20]!r}"
            self._ended = True
        elif not self._chunk:
            self._ended = True
        else:
            self._start()
        return not self._ended

    def _start(self) -> None:
        if self._members and (not self.boundaries or self.boundaries[-1] != self._made):
            self.boundaries.append(self._made)
        self._members += 1
        self._decoder = decoder(self._kind)

    def _more(self) -> bool:
        data = self._source.read(_CHUNK)
        self._chunk += data
        return bool(data)

    def _give_up(self, reason: str) -> None:
        """Ends a damaged member: raises Damaged, or skips to the next member."""
        self._decoder = None
        self._ended = True
        if not self._resume:
            raise Damaged(reason)
        magic = _GZIP if self._kind == "gzip" else _ZSTD[0]
        rest = self._given[1:] + self._chunk
        while (at := rest.find(magic)) < 0:
            rest = rest[1 - len(magic) :] + (data := self._source.read(_CHUNK))
            if not data:
                raise Damaged(reason)
        self._chunk, self._given, self._ended = rest[at:], b"", False
        self.damages.append((self._made, reason))
        self._start()
