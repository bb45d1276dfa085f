"""Words and characters of texts in Arrow's buffers, as 64-bit hashes, for other numba kernels.

text/characters.py defines words and characters. A word whose folded form is ASCII is hashed eight bytes at a time, with
bit 5 of each byte set, which lowercases letters and does not change digits. Any other word is hashed over its folded
code points. Most words therefore need no decoding. Word boundaries are found for 64 bytes at a time, for some thousand
words before they are hashed, so that branch mispredictions of one loop do not stall the other.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.text.characters import ALONE, BETWEEN, IDEOGRAPHS, JOIN, SEVERAL, SIZE, SKIP, TAGS, WORD
from moray.pipelines.text.simd_loads import WIDTH, eight_bytes, first_bit, in_words, popcount
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
_PLACES, _TURNS = 4096, 8  # boundaries of runs that are found before hashing, and boundaries written at a time


@numba.njit(nogil=True, inline="always")
def _character(data: Bytes, at: int, kinds: Bytes, folds: Codes) -> tuple[int, int, int]:
    """(kind, folded code point, offset of the next character). For SEVERAL, the second is an index into `folds`."""
    code, following = decoded(data, at)
    if code < SIZE:
        return int(kinds[code]), int(folds[code]), following
    if code < IDEOGRAPHS:
        return ALONE, code, following
    return (SKIP if TAGS[0] <= code < TAGS[1] else BETWEEN), code, following


@numba.njit(nogil=True)
def _ascii(data: Bytes, begin: int, end: int) -> tuple[np.uint64, np.uint64]:
    """The hash of an ASCII word, and a value that is 0 if all its bytes are ASCII."""
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
    """Writes the begin and end offsets of runs of word bytes to `places`. Returns (number of offsets, end offset).

    The scan ends at `end`, or when `places` is full. It never ends within a run.
    """
    at, count, carry = begin, 0, np.uint64(0)
    while at < end and count + WIDTH + _TURNS <= len(places):
        inside = in_words(data, at, end)
        turns = inside ^ ((inside << _ONE) | carry)
        carry = inside >> _63
        after = count + popcount(turns)
        while count < after:  # a fixed number at a time, even beyond `after`: fewer branches to predict
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
    """Hashes the words of the runs places[begin:end], up to the first run with a non-ASCII character.

    Returns (index of that run or `end`, total number of words). Non-ASCII runs are left to the caller: if this loop
    handled them, LLVM would not remove numba's reference counting of the arrays, which takes longer than a word.
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
    """Hashes the words of a run, one character at a time. Returns the total number of words.

    `word` is the hash of the folded code points; `eight` and `part` compute the hash of `_ascii`.
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
    """Writes a hash for each word of data[begin:end], valid UTF-8, to `out`. Returns the number of words.

    out: uint64, with one element per byte of text.
    """
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
    """As `words`, with a hash for each letter with its marks, and one for each separator between words."""
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
    """Writes the begin and end of each word of data[begin:end], in characters from its start. Returns their number.

    places: int64 [at least one row per byte, 2].
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
