"""WARC records cut out of a stream, each for itself: what is wrong with one is said of that one, and the next is found.

A record's Content-Length is believed where what it leads to is the end of a record: blank lines, the beginning of
another, the end of the file. Where it leads elsewhere, the record ends where the next begins, and so it does where the
archive's next member of gzip begins with another record. No more than the bytes of the longest page, twice, are held.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from moray.pipelines.corpus.pieces import MALFORMED, Reject, printable
from moray.pipelines.corpus.source_file import error_words

_VERSION = rb"WARC/[0-9]{1,2}\.[0-9]{1,3}[ \t]*\r?\n"
_BEGIN = re.compile(_VERSION)
_NEXT = re.compile(_VERSION + rb"(?=(?:WARC|Content)-[A-Za-z-]+[ \t]*:)", re.I)
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_HEAD = 1 << 20
_BLANK = b"\r\n\t \0"
_LOOK = 256  # bytes behind a record that are looked at
_READ = 1 << 16
CUT = "the file ends within this record"


@dataclass(frozen=True)
class WarcRecord:
    """headers: by names in small letters. is_long: body is only its beginning."""

    headers: dict[str, str]
    body: bytes
    length: int
    is_long: bool


def records(stream: io.BufferedReader, longest: int) -> Iterator[WarcRecord | Reject]:
    """The records of a stream, or what is wrong with each. longest: bytes of a record that anybody wants."""
    ahead = _Ahead(stream)
    number = 0
    while ahead.pass_blanks():
        yield from ahead.damages_before()
        yield _next(ahead, number, longest)
        number += 1
    yield from ahead.damages_before()
    if ahead.trouble and not ahead.told:
        yield Reject("", MALFORMED, ahead.trouble)


def _next(ahead: _Ahead, number: int, longest: int) -> WarcRecord | Reject:
    """What begins here: a record, or what is none up to where one begins."""
    head = ahead.head()
    if head is None:
        beginning, at = ahead.peek(40), ahead.place
        size = ahead.to_next(1)
        ahead.told = ahead.told or ahead.at_end()
        what = f"{size} bytes at {at} are no record: {printable(beginning.decode(errors='replace'))!r}"
        return Reject("", MALFORMED, ahead.trouble or what)
    headers = _fields(head)
    key = f"#{printable(headers.get('warc-record-id') or number).strip('<>')}"
    try:
        length = int(headers.get("content-length", ""))
    except ValueError:
        length = -1
    if length < 0:
        ahead.to_next(0)
        return Reject(key, MALFORMED, f"its Content-Length is {printable(headers.get('content-length'))[:40]!r}")
    if reason := ahead.pass_over(length, longest):
        return Reject(key, MALFORMED, reason)
    return WarcRecord(headers, ahead.body, length, length > longest)


def _fields(head: bytes) -> dict[str, str]:
    """A head's named fields, the first of each name; a line that begins with a blank goes on with the one before."""
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


class _Ahead:
    """What a stream holds from a place on, of which some is read already.

    trouble: why the stream ended before its end; told: whether a record was said to be cut by that. body: of the record
    that was passed over last and is whole, as much of it as is wanted.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._data = bytearray()
        self._ended = False
        self.place = 0  # of the first byte of what is held, in the stream
        self.trouble = ""
        self.told = False
        self.body = b""

    def have(self, size: int) -> bool:
        """Reads until so many bytes are there; False if there are fewer."""
        while len(self._data) < size and not self._ended:
            try:
                data = self._stream.read1(max(_READ, min(size - len(self._data), 1 << 20)))
            except OSError as error:
                self.trouble, data = error_words(error), b""
            self._data += data
            self._ended = not data
        return len(self._data) >= size

    def peek(self, size: int) -> bytes:
        self.have(size)
        return bytes(self._data[:size])

    def at_end(self) -> bool:
        return not self.have(1)

    def drop(self, size: int) -> None:
        self.place += min(size, len(self._data))
        del self._data[:size]

    def pass_blanks(self) -> bool:
        """Drops what may stand between records; False at the end."""
        while self.have(1):
            block = self._data[:_LOOK]
            kept = len(block.lstrip(_BLANK))
            self.drop(len(block) - kept)
            if kept:
                return True
        return False

    def head(self) -> bytes | None:
        """Takes the head of the record that begins here; None if none does."""
        self.have(64)
        if not _BEGIN.match(self._data):
            return None
        size = 1 << 12
        while True:
            more = self.have(size)
            limit = self._border(min(size, len(self._data)))
            end = _HEAD_END.search(self._data, 0, limit)
            if end or not more or limit < size or size >= _LONGEST_HEAD:
                break
            size *= 4
        if end is None:
            return None
        head = bytes(self._data[: end.start()])
        self.drop(end.end())
        return head

    def _border(self, size: int) -> int:
        """`size`, or where before it another record begins with a member of the archive, or damage ended one."""
        damaged = {at for at, _ in getattr(self._stream.raw, "damages", ())}
        for border in getattr(self._stream.raw, "borders", ()):
            at = border - self.place
            if 0 < at < size and (border in damaged or (self.have(at + 16) and _BEGIN.match(self._data, at))):
                return int(at)
        return size

    def damages_before(self) -> Iterator[Reject]:
        """Members that were given up without a record of theirs in sight."""
        damages = getattr(self._stream.raw, "damages", [])
        while damages and damages[0][0] <= self.place:
            yield Reject("", MALFORMED, f"a member of the archive is damaged: {damages.pop(0)[1]}")
        borders = getattr(self._stream.raw, "borders", [])
        while borders and borders[0] <= self.place:
            borders.pop(0)

    def _damage_at(self, place: int) -> str:
        """Takes what is known of damage there."""
        damages = getattr(self._stream.raw, "damages", [])
        found = [one for one in damages if self.place < one[0] <= place]
        for one in found:
            damages.remove(one)
        return found[0][1] if found else ""

    def pass_over(self, length: int, longest: int) -> str:
        """Drops a record's block; says what is wrong with it, if anything is: then it ends where the next begins."""
        self.body, is_first = b"", True
        while True:
            step = min(length, longest)
            whole = self.have(step + _LOOK) or len(self._data) >= step
            limit = self._border(min(step + 1, len(self._data)))
            if limit < min(step, len(self._data)) or (limit <= step and whole and self._damaged(limit)):
                return self._cut_at(limit)
            if not whole:
                return self._unfinished(length)
            if step == length:
                break
            if begin := _NEXT.search(self._data, 0, step):
                return self._hidden(begin.start(), length, longest)
            if is_first:
                self.body, is_first = self.peek(step), False
            self.drop(step - _LOOK)
            length -= step - _LOOK
        if self._ends_at(length):
            self.body = self.peek(length) if is_first else self.body
            self.drop(length)
            return ""
        return self._wrong(length)

    def _damaged(self, at: int) -> bool:
        return any(place == self.place + at for place, _ in getattr(self._stream.raw, "damages", ()))

    def _ends_at(self, length: int) -> bool:
        """Whether a record ends behind so many bytes."""
        rest = bytes(self._data[length : length + _LOOK])
        bare = rest.lstrip(_BLANK)
        if not bare or _BEGIN.match(bare):
            return True
        return rest.startswith((b"\r\n\r\n", b"\n\n")) and not _NEXT.search(self._data, 0, length)

    def _hidden(self, at: int, length: int, longest: int) -> str:
        """A record seems to begin within a long one. It is believed if the long one's end is too far off to be looked
        at: a record within a record is rare, and harms less than all that are lost by a wrong length."""
        rest = length - at
        near = rest <= longest
        if near:
            self.body = self.body or self.peek(at)
        self.drop(at)
        if near and (self.have(rest + _LOOK) or self.have(rest)) and self._ends_at_of_hidden(rest):
            self.drop(rest)
            return ""
        return f"its Content-Length is wrong: another record begins {rest} bytes before its end"

    def _ends_at_of_hidden(self, rest: int) -> bool:
        tail = bytes(self._data[rest : rest + _LOOK]).lstrip(_BLANK)
        return not tail or bool(_BEGIN.match(tail))

    def _cut_at(self, limit: int) -> str:
        why = self._damage_at(self.place + limit)
        self.drop(limit)
        return f"a member of the archive is damaged: {why}" if why else "another record begins within it"

    def _unfinished(self, length: int) -> str:
        """A record that reaches behind the end: it is cut, or its length is wrong and others begin within it."""
        if begin := _NEXT.search(self._data):
            self.drop(begin.start())
            return f"its Content-Length is wrong: {length} bytes from here on there is nothing"
        self.drop(len(self._data))
        self.told = True
        return self.trouble or CUT

    def _wrong(self, length: int) -> str:
        found = bytes(self._data[length : length + 20])
        self.to_next(0)
        return f"its Content-Length is wrong: what follows is {printable(found.decode(errors='replace'))!r}"

    def to_next(self, at_least: int) -> int:
        """Drops what stands before the next record, and says how much that was."""
        dropped = 0
        while True:
            more = self.have(_READ)
            begin = _NEXT.search(self._data, at_least)
            end = begin.start() if begin else len(self._data)
            limit = self._border(end)
            if begin or limit < end or not more:
                self.drop(limit)
                return dropped + limit
            size = max(0, len(self._data) - _LOOK)
            self.drop(size)
            dropped += size
            at_least = 0
