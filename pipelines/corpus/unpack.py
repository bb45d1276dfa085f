"""What gzip and zstd files hold, by the standard of their own tools: members one after another, zeros behind the last
one, frames with a window of up to 2 GB.

Damage within a member is an error, after all that came before it. What else lies behind the last member is none: the
file is whole, and `behind` says what was found. Python's own libraries, because Arrow's streams know no borders, take
padding for damage and stop at windows of 128 MB.
"""

from __future__ import annotations

import io
import zlib
from typing import Any, Protocol

_CHUNK = 1 << 16  # compressed bytes that are read at once
_PART = 1 << 20  # bytes that are unpacked at once
_LOG_WINDOW = 31  # 2 GB, the most that `zstd --long=31` writes; a reader holds as much
_GZIP = b"\x1f\x8b\x08"
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16)))  # frames, skippable frames


class Damaged(OSError):
    """A compressed file that breaks off, or holds what was not written by its compressor."""


def packed_as(beginning: bytes) -> str:
    """'gzip' or 'zstd' by the first bytes of a file; '' for neither."""
    if beginning.startswith(_GZIP):
        return "gzip"
    return "zstd" if beginning[:4] in _ZSTD else ""


class Decoder(Protocol):
    """One member, as `zstd` and `bz2` of the standard library have it."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib in that form."""

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
    """Of 'gzip' or 'zstd'. Errors are zlib.error and ZstdError, which `unpacking_errors` has."""
    if kind == "gzip":
        return _Gzip()
    from backports import zstd

    made: Decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _LOG_WINDOW})
    return made


def unpacking_errors() -> tuple[type[Exception], ...]:
    from backports import zstd

    return zlib.error, zstd.ZstdError, MemoryError, EOFError


class Unpacked(io.RawIOBase):
    """The content of a compressed file. Raises Damaged, or whatever `source` does.

    resume: what is damaged ends its member and not the file: it goes on with the next member that begins.
    borders: where, in the content, members begin, the first one excepted. damages: (where, what) a member was given up;
    there a border is too. behind: what lies behind the last member, '' for nothing or zeros.
    """

    def __init__(self, source: Any, kind: str, resume: bool = False) -> None:
        self._source, self._kind, self._resume = source, kind, resume
        self._decoder: Decoder | None = None
        self._chunk = b""  # compressed, not yet given to the decoder
        self._given = b""  # the last that was, in which the next member may begin
        self._ended = False
        self._made = self._members = 0
        self.borders: list[int] = []
        self.damages: list[tuple[int, str]] = []
        self.behind = ""

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
        """The next bytes of the content; none at a border, or where more has to be read first."""
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
        except unpacking_errors() as error:
            self._give_up(str(error) or type(error).__name__)
            return b""
        if decoder.eof:
            self._chunk = decoder.unused_data
            self._decoder = None
        return found

    def _begin(self) -> bool:
        """Starts on the member that comes next; False, and the end, where none does."""
        while True:
            if self._members:
                self._chunk = self._chunk.lstrip(b"\0")
            if len(self._chunk) >= 4 or not self._more():
                break
        if self._members and not self._chunk:
            self._ended = True
        elif self._members and packed_as(self._chunk) != self._kind:
            self.behind = f"behind the end of what is compressed lies something else: {self._chunk[:20]!r}"
            self._ended = True
        elif not self._chunk:
            self._ended = True
        else:
            self._start()
        return not self._ended

    def _start(self) -> None:
        if self._members and (not self.borders or self.borders[-1] != self._made):
            self.borders.append(self._made)
        self._members += 1
        self._decoder = decoder(self._kind)

    def _more(self) -> bool:
        data = self._source.read(_CHUNK)
        self._chunk += data
        return bool(data)

    def _give_up(self, why: str) -> None:
        """Ends a damaged member: with an error, or at the beginning of the next."""
        self._decoder = None
        self._ended = True
        if not self._resume:
            raise Damaged(why)
        magic = _GZIP if self._kind == "gzip" else _ZSTD[0]
        rest = self._given[1:] + self._chunk
        while (at := rest.find(magic)) < 0:
            rest = rest[1 - len(magic) :] + (data := self._source.read(_CHUNK))
            if not data:
                raise Damaged(why)
        self._chunk, self._given, self._ended = rest[at:], b"", False
        self.damages.append((self._made, why))
        self._start()
