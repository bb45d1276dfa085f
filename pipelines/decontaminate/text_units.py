"""The words or characters of a text with their positions: the units that dedup's kernel hashes, as strings.

Only texts with a match by hash are split into units, to verify the match.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.pipelines.text.characters import (
    ALONE,
    BETWEEN,
    IDEOGRAPHS,
    JOIN,
    SEVERAL,
    SIZE,
    SKIP,
    TAGS,
    WORD,
    tables,
    unspaced,
)

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """The units of a text. names[i]: unit i, normalized (text/characters.py). text[begins[i] : ends[i]]: as written."""

    text: str
    names: list[str]
    begins: Integers
    ends: Integers

    def __len__(self) -> int:
        return len(self.names)

    def holds(self, at: int, other: Units, other_at: int, size: int) -> bool:
        """Whether the n-gram of `size` units at `at` equals the one of `other` at `other_at`."""
        return self.names[at : at + size] == other.names[other_at : other_at + size]

    def excerpt(self, at: int, size: int) -> str:
        """The n-gram as written in the text."""
        return self.text[self.begins[at] : self.ends[at + size - 1]]


def is_telling(name: str, characters: bool) -> bool:
    """Whether a unit is informative: a word of two letters or more, or an ideograph; with characters, any letter."""
    letters = sum(map(str.isalpha, name))
    if characters or letters != 1:
        return letters > 0
    code = ord(name[0])
    return bool(tables()[0][code] == ALONE) if code < SIZE else True


def without_spaces(units: Units) -> bool:
    """Whether most units are letters of a script without spaces, in which a word has several letters."""
    return sum(unspaced(ord(name[0])) for name in units.names) * 2 > len(units)


def units_of(text: str, characters: bool) -> Units:
    """The units of a text, in order. With `characters`, a run of separators between two units is the unit " "."""
    codes, kinds, places, ends = _folded(text)
    between = kinds == BETWEEN
    starts = _starts(kinds, characters)
    firsts = np.flatnonzero(starts)
    bounds = np.append(np.flatnonzero(starts | between), len(kinds))
    lasts = bounds[np.searchsorted(bounds, firsts, side="right")]
    folded = codes.astype("<u4").tobytes().decode("utf-32-le")
    names = [folded[first:last] for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
    begins, ends = places[firsts], ends[lasts - 1]
    if not characters:
        return Units(text, names, begins, ends)
    gaps = np.flatnonzero(firsts[1:] > lasts[:-1])
    at = gaps + 1
    named = np.insert(np.array(names, object), at, " ")
    after = np.minimum(ends[gaps], begins[gaps + 1])  # a character may be part of two units
    return Units(text, named.tolist(), np.insert(begins, at, after), np.insert(ends, at, begins[gaps + 1]))


def _folded(text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], Integers, Integers]:
    """The folded text: code points, kinds, and the begin and end of the original character of each in the text,
    including the skipped characters after it."""
    known, folds = tables()
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    inside = np.minimum(codes, SIZE - 1)
    beyond = np.where(codes < IDEOGRAPHS, ALONE, np.where((codes >= TAGS[0]) & (codes < TAGS[1]), SKIP, BETWEEN))
    kinds = np.where(codes < SIZE, known[inside], beyond).astype(np.uint8)
    codes = np.where(codes < SIZE, folds[inside], codes)
    counted = np.append(np.where(kinds == SKIP, len(kinds), np.arange(len(kinds))), len(kinds))
    ends = np.minimum.accumulate(counted[::-1])[::-1][1:]
    several = kinds == SEVERAL
    lengths = np.where(several, folds[np.where(several, codes, 0)], kinds != SKIP).astype(np.int64)
    places = np.repeat(np.arange(len(kinds)), lengths)
    number = np.arange(len(places)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    expanded = several[places]
    codes = codes[places]
    codes[expanded] = folds[codes[expanded] + 1 + number[expanded]]
    kinds = kinds[places]
    kinds[expanded] = known[codes[expanded]]
    return codes, kinds, places, ends[places]


def _starts(kinds: npt.NDArray[np.uint8], characters: bool) -> npt.NDArray[np.bool_]:
    """Whether a unit begins at each character. A unit begins after a separator; with words, also at a letter that is a
    word by itself, and after such a letter with its marks."""
    before = np.concatenate(([BETWEEN], kinds[:-1]))
    if characters:
        return (kinds != BETWEEN) & ((before == BETWEEN) | (kinds != JOIN))
    carrier = np.maximum.accumulate(np.where(before == JOIN, 0, np.arange(len(kinds))))  # the letter with these marks
    after_alone = (kinds == WORD) & (before[carrier] == ALONE)
    return (kinds != BETWEEN) & ((before == BETWEEN) | (kinds == ALONE) | after_alone)
