"""Gopher's quality and repetition rules (arXiv 2112.11446, A.1, table A1), compiled by numba.

Where the paper is ambiguous, the rules follow datatrove 0.10: words that consist of symbols alone are not counted;
shares of characters are of all characters, including white space; duplicate n-grams are counted without overlap; of
equally frequent n-grams, the first counts.

`quality` and `repetition` return (the broken limit or NONE, its value). limits: in the order of the family's fields in
config.py; NaN: off.
"""

from __future__ import annotations

import numba
import numpy as np

from moray.pipelines.filter.character_kinds import LETTER, SYMBOL
from moray.pipelines.filter.document_layout import (
    NEWLINE,
    NONE,
    ZERO,
    Counts,
    DocumentLayout,
    Hashes,
    Numbers,
    count_key,
    count_symbols,
    empty_table,
    ends_in_ellipsis,
    first_broken,
    hash_of,
    hash_of_words,
    line_end,
    most_counted,
    stripped,
)

_HYPHEN, _BULLET = 45, 0x2022
_IS_MINIMUM = np.array([1, 0, 1, 0, 0, 0, 0, 0, 1, 1], np.bool_)  # of the limits


@numba.njit(nogil=True)
def _words(document: DocumentLayout) -> tuple[int, int, int]:
    """(words that are not symbols alone, their characters, words with a letter)."""
    plain = characters = alphabetic = 0
    for w in range(len(document.words)):
        every, some = True, False
        for i in range(document.begins[w], document.ends[w]):
            every &= document.bits[i] & SYMBOL != 0
            some |= document.bits[i] & LETTER != 0
        alphabetic += some
        if not every:
            plain += 1
            characters += document.ends[w] - document.begins[w]
    return plain, characters, alphabetic


@numba.njit(nogil=True)
def _lines(document: DocumentLayout) -> tuple[int, int, int]:
    """(lines, lines that begin with a bullet, lines that end in an ellipsis)."""
    lines = bullets = ellipses = at = ZERO
    while at < len(document.codes):
        end, following = line_end(document.codes, document.bits, at)
        begin, end = stripped(document.bits, at, end)
        lines += 1
        bullets += begin < end and (document.codes[begin] == _HYPHEN or document.codes[begin] == _BULLET)
        ellipses += ends_in_ellipsis(document.codes, begin, end)
        at = following
    return lines, bullets, ellipses


@numba.njit(nogil=True)
def _different_stop_words(words: Hashes, stop_words: Hashes) -> int:
    found = 0
    for stop_word in stop_words:
        for word in words:
            if word == stop_word:
                found += 1
                break
    return found


@numba.njit(nogil=True)
def quality(document: DocumentLayout, limits: Numbers, stop_words: Hashes) -> tuple[int, float]:
    plain, characters, alphabetic = _words(document)
    hashes, ellipses = count_symbols(document.codes)
    lines, bullets, cut_off = _lines(document)
    words, lines = max(len(document.words), 1), max(lines, 1)
    mean = characters / max(plain, 1)
    values = (
        float(plain), float(plain), mean, mean, hashes / words, ellipses / words, bullets / lines, cut_off / lines,
        alphabetic / words, float(_different_stop_words(document.words, stop_words)),
    )  # fmt: skip
    return first_broken(values, limits, _IS_MINIMUM)


@numba.njit(nogil=True)
def _repeated_parts(
    document: DocumentLayout, begin: int, end: int, min_newlines: int, counts: Counts
) -> tuple[int, int, int]:
    """(parts between runs of at least `min_newlines` newlines, duplicates among them, characters of the duplicates)."""
    mask = empty_table(counts, end - begin + 1)
    parts = repeated = characters = 0
    at = i = begin
    while True:
        following = i
        while following < end and document.codes[following] == NEWLINE:
            following += 1
        if i < end and following - i < min_newlines:  # within a part
            i = max(following, i + 1)
            continue
        parts += 1
        if count_key(counts, mask, hash_of(document.codes, at, i), at):
            repeated += 1
            characters += i - at
        if i == end:
            return parts, repeated, characters
        at = i = following


@numba.njit(nogil=True)
def _characters(document: DocumentLayout, begin: int, count: int) -> int:
    """The characters of `count` words from word `begin` on."""
    characters = 0
    for w in range(begin, begin + count):
        characters += document.ends[w] - document.begins[w]
    return characters


@numba.njit(nogil=True)
def _most_frequent(document: DocumentLayout, size: int, counts: Counts) -> tuple[int, int]:
    """(characters of all occurrences of the most frequent n-gram, with a space between words; occurrences)."""
    grams = len(document.words) - size + 1
    mask = empty_table(counts, grams)
    for w in range(grams):
        count_key(counts, mask, hash_of_words(document.words, w, size), w)
    first, times = most_counted(counts)
    return (_characters(document, first, size) + size - 1) * times, times


@numba.njit(nogil=True)
def _repeated_grams(document: DocumentLayout, size: int, counts: Counts) -> int:
    """The characters of words in duplicate n-grams."""
    grams = len(document.words) - size + 1
    mask = empty_table(counts, grams)
    characters = w = 0
    while w < grams:
        if count_key(counts, mask, hash_of_words(document.words, w, size), w):
            characters += _characters(document, w, size)
            w += size
        else:
            w += 1
    return characters


@numba.njit(nogil=True)
def repetition(document: DocumentLayout, limits: Numbers, counts: Counts) -> tuple[int, float]:
    length = len(document.codes)
    begin, end = stripped(document.bits, ZERO, length)
    parts, repeated, characters = _repeated_parts(document, begin, end, ZERO + 2, counts)
    if repeated / parts > limits[0]:
        return 0, repeated / parts
    if characters / length > limits[1]:
        return 1, characters / length
    parts, repeated, characters = _repeated_parts(document, ZERO, length, ZERO + 1, counts)
    if repeated / parts > limits[2]:
        return 2, repeated / parts
    if characters / length > limits[3]:
        return 3, characters / length
    return _repeated_words(document, limits, counts)


@numba.njit(nogil=True)
def _repeated_words(document: DocumentLayout, limits: Numbers, counts: Counts) -> tuple[int, float]:
    """Applies the limits from the fifth on: the most frequent 2- to 4-grams, and duplicate 5- to 10-grams.

    If no n-gram of some size occurs twice, no longer one does, so longer ones are not counted.
    """
    length, found, times = len(document.codes), 1, 2
    for k in range(4, len(limits)):
        size = k - 2
        if len(document.words) < size:
            break
        if np.isnan(limits[k]):
            continue
        if size > 4:
            found = _repeated_grams(document, size, counts) if found and times > 1 else 0
        elif times > 1:
            found, times = _most_frequent(document, size, counts)
        else:
            found = _characters(document, 0, size) + size - 1
        if found / length > limits[k]:
            return k, found / length
    return NONE, 0.0
