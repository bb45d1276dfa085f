"""Words and characters of texts in Arrow's memory, as 64-bit hashes; compiled by numba into what needs them.

What they are, dedup/characters.py says. The hash of a word of ASCII is over eight bytes at a time, each with 32 set,
which makes a letter lower case and leaves a digit; that of any other over the code points of its lower case. So most
words need no decoding: where they begin and end is told for 64 bytes at a time.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.characters import ALONE, BETWEEN, SIZE, WORD
from moray.pipelines.text.utf8 import decoded, mixed
from moray.pipelines.text.wide import WIDTH, eight_bytes, first_bit, in_words

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_FIRST = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_SPACE = np.uint64(32)
_ONE, _8, _63, _64 = np.uint64(1), np.uint64(8), np.uint64(63), np.uint64(64)
_LOW, _HIGH = np.uint64(0x2020202020202020), np.uint64(0x8080808080808080)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_LAST = 0x40000  # code points from SIZE up to here are ideographs


@numba.njit(nogil=True, inline="always")
def _character(data: Bytes, at: int, kinds: Bytes, lowers: Codes) -> tuple[int, int, int]:
    """(kind, code point in lower case, where the next one is)."""
    code, following = decoded(data, at)
    if code < SIZE:
        return int(kinds[code]), int(lowers[code]), following
    return (ALONE if code < _LAST else BETWEEN), code, following


@numba.njit(nogil=True)
def _ascii(data: Bytes, begin: int, end: int) -> tuple[np.uint64, np.uint64]:
    """The hash of a word of ASCII, and bits that tell whether it is one."""
    word, at, seen = _FIRST, begin, np.uint64(0)
    while end - at > 8:
        part = eight_bytes(data, at)
        seen |= part
        word = mixed(word ^ (part | _LOW))
        at += 8
    used = _ALL >> (_64 - _8 * np.uint64(end - at))
    if at + 8 <= len(data):
        part = eight_bytes(data, at) & used
    else:
        part = np.uint64(0)
        for i in range(at, end):
            part |= np.uint64(data[i]) << (_8 * np.uint64(i - at))
    return mixed(word ^ (part | (_LOW & used))), (seen | part) & _HIGH


@numba.njit(nogil=True)
def _of_ascii(data: Bytes, begin: int, end: int, out: Hashes, count: int) -> tuple[int, int]:
    """`words`, up to the first that may have a character beyond ASCII: where that begins, or the end; and how many.

    What is not of ASCII is left to the caller: with that in this loop too, LLVM no longer removes numba's counting of
    references to the arrays, which takes longer than a word.
    """
    at, since, carry = begin, -1, np.uint64(0)  # since: where the run of bytes in words that is open began
    while at < end:
        inside = in_words(data, at, end)
        turns = inside ^ ((inside << _ONE) | carry)
        carry = inside >> _63
        while turns:
            place = at + first_bit(turns)
            turns &= turns - _ONE
            if since < 0:
                since = place
                continue
            out[count], beyond = _ascii(data, since, place)
            if beyond:
                return since, count
            count += 1
            since = -1
        at += WIDTH
    if since >= 0:
        out[count], beyond = _ascii(data, since, end)
        if beyond:
            return since, count
        count += 1
    return end, count


@numba.njit(nogil=True)
def _of_any_script(
    data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, out: Hashes, count: int
) -> tuple[int, int]:
    """`words`, a character at a time, up to the first of ASCII that is in none: what follows it; and how many."""
    at = since = begin
    word, beyond = _FIRST, 0
    while at < end:
        before = at
        kind, code, at = _character(data, at, kinds, lowers)
        if kind == WORD:
            word, beyond = (word ^ np.uint64(code)) * _PRIME, beyond | code
            continue
        if before > since:
            out[count] = mixed(word) if beyond >= 128 else _ascii(data, since, before)[0]
            count += 1
        if kind == ALONE:
            out[count] = mixed((_FIRST ^ np.uint64(code)) * _PRIME)
            count += 1
        elif code < 128:
            return at, count
        word, beyond, since = _FIRST, 0, at
    if end > since:
        out[count] = mixed(word) if beyond >= 128 else _ascii(data, since, end)[0]
        count += 1
    return end, count


@numba.njit(nogil=True)
def words(data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, out: Hashes) -> int:
    """Writes a hash for each word of data[begin:end], valid UTF-8, to `out`, with room for one a byte; how many."""
    at, count = _of_ascii(data, begin, end, out, 0)
    while at < end:
        at, count = _of_any_script(data, at, end, kinds, lowers, out, count)
        at, count = _of_ascii(data, at, end, out, count)
    return count


@numba.njit(nogil=True)
def characters_of(data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, out: Hashes) -> int:
    """The same for each character of words, and for what lies between two of them."""
    count, at, between = 0, begin, False
    while at < end:
        kind, code, at = _character(data, at, kinds, lowers)
        if kind == BETWEEN:
            between = count > 0
            continue
        if between:
            out[count] = mixed((_FIRST ^ _SPACE) * _PRIME)
            count += 1
            between = False
        out[count] = mixed((_FIRST ^ np.uint64(code)) * _PRIME)
        count += 1
    return count


@numba.njit(nogil=True)
def word_places(data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, places: Places) -> int:
    """Writes where each word of data[begin:end] begins and ends, in characters from its begin; how many there are.

    places: int64 [room for one a byte, 2].
    """
    count, at, character, inside = 0, begin, 0, False
    while at < end:
        kind, _, at = _character(data, at, kinds, lowers)
        if kind == WORD and not inside:
            places[count, 0], inside = character, True
        elif kind != WORD and inside:
            places[count, 1], inside = character, False
            count += 1
        if kind == ALONE:
            places[count, 0], places[count, 1] = character, character + 1
            count += 1
        character += 1
    if inside:
        places[count, 1] = character
        count += 1
    return count
