"""Words and characters of texts in Arrow's memory, as 64-bit hashes; compiled by numba into what needs them.

What they are, text/characters.py says. The hash of a word whose folded form is ASCII is over eight bytes at a time,
each with 32 set, which makes a letter lower case and leaves a digit; that of any other over the folded code points. So
most words need no decoding: where they begin and end is told for 64 bytes at a time, and some thousand words at a time,
so that neither loop waits for the other's jumps.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.text.characters import ALONE, BETWEEN, IDEOGRAPHS, JOIN, SEVERAL, SIZE, SKIP, TAGS, WORD
from moray.pipelines.text.simd_loads import WIDTH, eight_bytes, first_bit, how_many, in_words
from moray.pipelines.text.utf8 import decoded, mixed

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_FIRST = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_SPACE = np.uint64(32)
_ZERO, _ONE, _8, _16, _63, _64 = np.uint64(0), np.uint64(1), np.uint64(8), np.uint64(16), np.uint64(63), np.uint64(64)
_LOW, _HIGH = np.uint64(0x2020202020202020), np.uint64(0x8080808080808080)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_PLACES, _TURNS = 4096, 8  # where runs begin or end: so many are found before their words are; so many at a time


@numba.njit(nogil=True, inline="always")
def _character(data: Bytes, at: int, kinds: Bytes, folds: Codes) -> tuple[int, int, int]:
    """(kind, folded code point, where the next one is); of SEVERAL, where in `folds` they are told."""
    code, following = decoded(data, at)
    if code < SIZE:
        return int(kinds[code]), int(folds[code]), following
    if code < IDEOGRAPHS:
        return ALONE, code, following
    return (SKIP if TAGS[0] <= code < TAGS[1] else BETWEEN), code, following


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
def _runs(data: Bytes, begin: int, end: int, places: Places) -> tuple[int, int]:
    """Writes where runs of bytes that may be in words begin and end; how many places these are, and where it ended.

    It ends where data[begin:end] does, or where `places` has no more room: before a run that is cut there.
    """
    at, count, carry = begin, 0, np.uint64(0)
    while at < end and count + WIDTH + _TURNS <= len(places):
        inside = in_words(data, at, end)
        turns = inside ^ ((inside << _ONE) | carry)
        carry = inside >> _63
        after = count + how_many(turns)
        while count < after:  # a few at a time, more than there are too: a jump less to foresee
            for k in range(_TURNS):
                places[count + k] = at + first_bit(turns)
                turns &= turns - _ONE
            count += _TURNS
        count = after
        at += WIDTH
    if not carry:
        return count, min(at, end)
    if at < end:
        return count - 1, places[count - 1]
    places[count] = end
    return count + 1, end


@numba.njit(nogil=True)
def _of_ascii(data: Bytes, places: Places, begin: int, end: int, out: Hashes, count: int) -> tuple[int, int]:
    """The words of the runs places[begin:end], up to the first that has a character beyond ASCII: that, or the end; and
    how many words there are now.

    What is not of ASCII is left to the caller: with that in this loop too, LLVM no longer removes numba's counting of
    references to the arrays, which takes longer than a word.
    """
    for i in range(begin, end, 2):
        first, last = places[i], places[i + 1]
        length = np.uint64(last - first)
        if length > _16 or first + 16 > len(data):
            word, beyond = _ascii(data, first, last)
        elif length > _8:
            used = _ALL >> (_8 * (_16 - length))
            part, rest = eight_bytes(data, first), eight_bytes(data, first + 8) & used
            word, beyond = mixed(mixed(_FIRST ^ (part | _LOW)) ^ (rest | (_LOW & used))), (part | rest) & _HIGH
        else:
            used = _ALL >> (_64 - _8 * length)
            part = eight_bytes(data, first) & used
            word, beyond = mixed(_FIRST ^ (part | (_LOW & used))), part & _HIGH
        if beyond:
            return i, count
        out[count] = word
        count += 1
    return end, count


@numba.njit(nogil=True)
def _of_any_script(data: Bytes, begin: int, end: int, kinds: Bytes, folds: Codes, out: Hashes, count: int) -> int:
    """The words of a run, a character at a time; how many words there are now.

    `word` hashes the folded code points, `eight` and `part` the same as ASCII, as `_ascii` does.
    """
    at, inside = begin, BETWEEN
    word, beyond, eight, part, filled = _FIRST, 0, _FIRST, _ZERO, _ZERO
    while at < end:
        kind, code, at = _character(data, at, kinds, folds)
        if kind == SKIP:
            continue
        first, total = (code + 1, int(folds[code])) if kind == SEVERAL else (-1, 1)
        for k in range(total):
            if first >= 0:
                code = int(folds[first + k])
                kind = int(kinds[code])
            if inside != BETWEEN and (kind in (BETWEEN, ALONE) or (kind == WORD and inside == ALONE)):
                out[count] = mixed(word) if beyond >= 128 else mixed(eight ^ part)
                count += 1
                word, beyond, eight, part, filled = _FIRST, 0, _FIRST, _ZERO, _ZERO
                inside = BETWEEN
            if kind == BETWEEN:
                continue
            if inside == BETWEEN:
                inside = ALONE if kind == ALONE else WORD
            word, beyond = (word ^ np.uint64(code)) * _PRIME, beyond | code
            if beyond < 128:
                if filled == _64:
                    eight, part, filled = mixed(eight ^ part), _ZERO, _ZERO
                part |= (np.uint64(code) | _SPACE) << filled
                filled += _8
    if inside != BETWEEN:
        out[count] = mixed(word) if beyond >= 128 else mixed(eight ^ part)
        count += 1
    return count


@numba.njit(nogil=True)
def words(data: Bytes, begin: int, end: int, kinds: Bytes, folds: Codes, out: Hashes) -> int:
    """Writes a hash for each word of data[begin:end], valid UTF-8, to `out`, with room for one a byte; how many."""
    at, count, places = begin, 0, np.empty(_PLACES, np.int64)
    while at < end:
        total, at = _runs(data, at, end, places)
        i = 0
        while i < total:
            i, count = _of_ascii(data, places, i, total, out, count)
            if i < total:
                count = _of_any_script(data, places[i], places[i + 1], kinds, folds, out, count)
                i += 2
    return count


@numba.njit(nogil=True)
def characters_of(data: Bytes, begin: int, end: int, kinds: Bytes, folds: Codes, out: Hashes) -> int:
    """The same for each character of words, a letter with its marks, and for what lies between two of them."""
    count, at, between, inside, character = 0, begin, False, False, _FIRST
    while at < end:
        kind, code, at = _character(data, at, kinds, folds)
        if kind == SKIP:
            continue
        first, total = (code + 1, int(folds[code])) if kind == SEVERAL else (-1, 1)
        for k in range(total):
            if first >= 0:
                code = int(folds[first + k])
                kind = int(kinds[code])
            if inside and kind != JOIN:
                out[count] = mixed(character)
                count += 1
                character, inside = _FIRST, False
            if kind == BETWEEN:
                between = count > 0
                continue
            if between:
                out[count] = mixed((_FIRST ^ _SPACE) * _PRIME)
                count += 1
                between = False
            character, inside = (character ^ np.uint64(code)) * _PRIME, True
    if inside:
        out[count] = mixed(character)
        count += 1
    return count


@numba.njit(nogil=True)
def word_places(data: Bytes, begin: int, end: int, kinds: Bytes, folds: Codes, places: Places) -> int:
    """Writes where each word of data[begin:end] begins and ends, in characters from its begin; how many there are.

    places: int64 [room for one a byte, 2].
    """
    count, at, character, inside = 0, begin, -1, BETWEEN
    while at < end:
        kind, code, at = _character(data, at, kinds, folds)
        character += 1
        if kind == SKIP:
            if inside != BETWEEN:
                places[count - 1, 1] = character + 1
            continue
        first, total = (code + 1, int(folds[code])) if kind == SEVERAL else (-1, 1)
        for k in range(total):
            if first >= 0:
                kind = int(kinds[int(folds[first + k])])
            if kind == BETWEEN:
                inside = BETWEEN
                continue
            if inside == BETWEEN or kind == ALONE or (kind == WORD and inside == ALONE):
                places[count, 0], inside = character, ALONE if kind == ALONE else WORD
                count += 1
            places[count - 1, 1] = character + 1
    return count
