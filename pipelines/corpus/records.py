"""Splits a stream into WARC records. A damaged record is reported, and the scan continues with the next one.

A record's Content-Length is trusted only if it leads to the end of a record: blank lines, the beginning of another
record, or the end of the file. Otherwise the record ends at the beginning of the next one. It also ends at the next
gzip member that begins with a record. At most twice the bytes of the longest page are held in memory.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from moray.pipelines.corpus.pieces import MALFORMED, Reject, printable
from moray.pipelines.corpus.source_file import error_text

_VERSION = rb"WARC/[0-9]{1,2}\.[0-9]{1,3}[ \t]*\r?\n"
_BEGIN = re.compile(_VERSION)
_NEXT = re.compile(_VERSION + rb"(?=(?:WARC|Content)-[A-Za-z-]+[ \t]*:)", re.I)
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_HEAD = 1 << 20
_BLANK = b"\r\n\t \0"
_LOOKAHEAD = 256  # bytes examined after a record
_READ = 1 << 16
CUT = "the file ends within this record"


@dataclass(frozen=True)
class WarcRecord:
    """headers: by lower-case name. length: bytes of the whole record. is_long: `body` holds only its beginning."""

    headers: dict[str, str]
    body: bytes
    length: int
    is_long: bool


def records(stream: io.BufferedReader, longest: int) -> Iterator[WarcRecord | Reject]:
    """The records of a stream, with a reject for each damaged one. longest: maximum bytes kept of a record."""
    ahead = _Scanner(stream)
    number = 0
    while ahead.skip_blanks():
        yield from ahead.damages_before()
        yield _next(ahead, number, longest)
        number += 1
    yield from ahead.damages_before()
    if ahead.stream_error and not ahead.error_reported:
        yield Reject("", MALFORMED, ahead.stream_error)


def _next(ahead: _Scanner, number: int, longest: int) -> WarcRecord | Reject:
    """The record at the current offset, or a reject for the bytes before the next record."""
    head = ahead.head()
    if head is None:
        beginning, at = ahead.peek(40), ahead.offset
        size = ahead.skip_to_next(1)
        ahead.error_reported = ahead.error_reported or ahead.at_end()
        problem = f"{size} bytes at offset {at} are not a record: {printable(beginning.decode(errors='replace'))!r}"
        return Reject("", MALFORMED, ahead.stream_error or problem)
    headers = _fields(head)
    key = f"#{printable(headers.get('warc-record-id') or number).strip('<>')}"
    try:
        length = int(headers.get("content-length", ""))
    except ValueError:
        length = -1
    if length < 0:
        ahead.skip_to_next(0)
        return Reject(key, MALFORMED, f"invalid Content-Length {printable(headers.get('content-length'))[:40]!r}")
    if reason := ahead.read_block(length, longest):
        return Reject(key, MALFORMED, reason)
    return WarcRecord(headers, ahead.body, length, length > longest)


def _fields(head: bytes) -> dict[str, str]:
    """The header fields, the first of each name. A line that begins with a blank continues the line before it."""
    found: dict[str, list[str]] = {}
    last: list[str] = []
    for line in head.decode("utf-8", "replace").splitlines()[1:]:
        if line[:1] in (" ", "\t"):
            last.append(line.strip())
        elif ":" in line:
            name, _, value = line.partition(":")
            last = [value.strip()]
            found.setdefault(name.strip().lower(), last)
    return {name: " ".join(parts) for name, parts in found.items()}


class _Scanner:
    """A buffered position in a stream.

    stream_error: the error that ended the stream early. error_reported: whether a reject for a cut record already
    reported it. body: beginning of the last complete record, up to the longest size that is kept.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._data = bytearray()
        self._ended = False
        self.offset = 0  # of the first buffered byte in the stream
        self.stream_error = ""
        self.error_reported = False
        self.body = b""

    def have(self, size: int) -> bool:
        """Buffers at least `size` bytes. False if the stream ends before."""
        while len(self._data) < size and not self._ended:
            try:
                data = self._stream.read1(max(_READ, min(size - len(self._data), 1 << 20)))
            except OSError as error:
                self.stream_error, data = error_text(error), b""
            self._data += data
            self._ended = not data
        return len(self._data) >= size

    def peek(self, size: int) -> bytes:
        self.have(size)
        return bytes(self._data[:size])

    def at_end(self) -> bool:
        return not self.have(1)

    def drop(self, size: int) -> None:
        self.offset += min(size, len(self._data))
        del self._data[:size]

    def skip_blanks(self) -> bool:
        """Drops blank bytes, which may separate records. False at the end of the stream."""
        while self.have(1):
            block = self._data[:_LOOKAHEAD]
            kept = len(block.lstrip(_BLANK))
            self.drop(len(block) - kept)
            if kept:
                return True
        return False

    def head(self) -> bytes | None:
        """Consumes the head of the record at the current offset. None if no record begins there."""
        self.have(64)
        if not _BEGIN.match(self._data):
            return None
        size = 1 << 12
        while True:
            more = self.have(size)
            limit = self._boundary(min(size, len(self._data)))
            end = _HEAD_END.search(self._data, 0, limit)
            if end or not more or limit < size or size >= _LONGEST_HEAD:
                break
            size *= 4
        if end is None:
            return None
        head = bytes(self._data[: end.start()])
        self.drop(end.end())
        return head

    def _boundary(self, size: int) -> int:
        """`size`, or the first boundary of archive members before it at which a record begins or damage ended one."""
        damaged = {at for at, _ in getattr(self._stream.raw, "damages", ())}
        for boundary in getattr(self._stream.raw, "boundaries", ()):
            at = boundary - self.offset
            if 0 < at < size and (boundary in damaged or (self.have(at + 16) and _BEGIN.match(self._data, at))):
                return int(at)
        return size

    def damages_before(self) -> Iterator[Reject]:
        """Rejects for damaged members that are not part of a record."""
        damages = getattr(self._stream.raw, "damages", [])
        while damages and damages[0][0] <= self.offset:
            yield Reject("", MALFORMED, f"damaged archive member: {damages.pop(0)[1]}")
        boundaries = getattr(self._stream.raw, "boundaries", [])
        while boundaries and boundaries[0] <= self.offset:
            boundaries.pop(0)

    def _take_damage(self, end: int) -> str:
        """The first damage up to the offset `end`, or ''. All damages up to there are removed from the list."""
        damages = getattr(self._stream.raw, "damages", [])
        found = [damage for damage in damages if self.offset < damage[0] <= end]
        for damage in found:
            damages.remove(damage)
        return found[0][1] if found else ""

    def read_block(self, length: int, longest: int) -> str:
        """Consumes a record's block and keeps its beginning in `body`.

        Returns the problem with it, or ''. A block with a problem ends at the beginning of the next record.
        """
        self.body, is_first = b"", True
        while True:
            step = min(length, longest)
            complete = self.have(step + _LOOKAHEAD) or len(self._data) >= step
            limit = self._boundary(min(step + 1, len(self._data)))
            if limit < min(step, len(self._data)) or (limit <= step and complete and self._damaged(limit)):
                return self._cut_at(limit)
            if not complete:
                return self._unfinished(length)
            if step == length:
                break
            if begin := _NEXT.search(self._data, 0, step):
                return self._nested(begin.start(), length, longest)
            if is_first:
                self.body, is_first = self.peek(step), False
            self.drop(step - _LOOKAHEAD)
            length -= step - _LOOKAHEAD
        if self._ends_at(length):
            self.body = self.peek(length) if is_first else self.body
            self.drop(length)
            return ""
        return self._wrong_length(length)

    def _damaged(self, at: int) -> bool:
        return any(offset == self.offset + at for offset, _ in getattr(self._stream.raw, "damages", ()))

    def _ends_at(self, length: int) -> bool:
        """Whether a record ends after `length` bytes."""
        rest = bytes(self._data[length : length + _LOOKAHEAD])
        bare = rest.lstrip(_BLANK)
        if not bare or _BEGIN.match(bare):
            return True
        return rest.startswith((b"\r\n\r\n", b"\n\n")) and not _NEXT.search(self._data, 0, length)

    def _nested(self, at: int, length: int, longest: int) -> str:
        """Handles a record that seems to begin inside a long one.

        If the end of the long record is too far away to be checked, its length is assumed to be wrong: a record inside
        a record is rare, and does less harm than a wrong length, which loses all records that follow.
        """
        rest = length - at
        near = rest <= longest
        if near:
            self.body = self.body or self.peek(at)
        self.drop(at)
        if near and (self.have(rest + _LOOKAHEAD) or self.have(rest)) and self._outer_ends_at(rest):
            self.drop(rest)
            return ""
        return f"wrong Content-Length: another record begins {rest} bytes before the end of this one"

    def _outer_ends_at(self, rest: int) -> bool:
        tail = bytes(self._data[rest : rest + _LOOKAHEAD]).lstrip(_BLANK)
        return not tail or bool(_BEGIN.match(tail))

    def _cut_at(self, limit: int) -> str:
        damage = self._take_damage(self.offset + limit)
        self.drop(limit)
        return f"damaged archive member: {damage}" if damage else "another record begins inside this one"

    def _unfinished(self, length: int) -> str:
        """Handles a record that extends past the end of the file: either the file is truncated, or the length is wrong
        and another record begins inside this one."""
        if begin := _NEXT.search(self._data):
            self.drop(begin.start())
            return f"wrong Content-Length: the file ends before the next {length} bytes"
        self.drop(len(self._data))
        self.error_reported = True
        return self.stream_error or CUT

    def _wrong_length(self, length: int) -> str:
        following = printable(bytes(self._data[length : length + 20]).decode(errors="replace"))
        self.skip_to_next(0)
        return f"wrong Content-Length: the record is followed by {following!r}"

    def skip_to_next(self, at_least: int) -> int:
        """Drops the bytes before the next record, at least `at_least`, and returns their number."""
        dropped = 0
        while True:
            more = self.have(_READ)
            begin = _NEXT.search(self._data, at_least)
            end = begin.start() if begin else len(self._data)
            limit = self._boundary(end)
            if begin or limit < end or not more:
                self.drop(limit)
                return dropped + limit
            size = max(0, len(self._data) - _LOOKAHEAD)
            self.drop(size)
            dropped += size
            at_least = 0
