"""The basic rules, and FineWeb's rules (arXiv 2406.17557, 3.6), compiled by numba. Results as in gopher.py.

FineWeb's rules follow datatrove 0.10: only a newline ends a line, and a line with anything after its last punctuation,
even white space, does not end in punctuation.
"""

from __future__ import annotations

import numba
import numpy as np

from moray.pipelines.filter.character_kinds import LETTER, SPACE, TERMINAL
from moray.pipelines.filter.document_layout import (
    EMPTY,
    NEWLINE,
    NONE,
    ZERO,
    Counts,
    DocumentLayout,
    Numbers,
    count_key,
    count_symbols,
    empty_table,
    ends_in_ellipsis,
    first_broken,
    hash_of,
    line_end,
    stripped,
)

_IS_MINIMUM = np.array([1, 0, 1, 0, 0, 0, 1, 0], np.bool_)  # of the limits


@numba.njit(nogil=True)
def _words(document: DocumentLayout) -> tuple[int, int]:
    """(characters of words, words with a letter)."""
    characters = alphabetic = 0
    for w in range(len(document.words)):
        some = False
        for i in range(document.begins[w], document.ends[w]):
            some |= document.bits[i] & LETTER != 0
        alphabetic += some
        characters += document.ends[w] - document.begins[w]
    return characters, alphabetic


@numba.njit(nogil=True)
def _lines(document: DocumentLayout, counts: Counts) -> tuple[int, int, int]:
    """(lines that are not blank, lines that end in an ellipsis, duplicate lines), after stripping white space."""
    mask = empty_table(counts, len(document.codes))
    lines = ellipses = repeated = at = ZERO
    while at < len(document.codes):
        end, following = line_end(document.codes, document.bits, at)
        begin, end = stripped(document.bits, at, end)
        if begin < end:
            lines += 1
            ellipses += ends_in_ellipsis(document.codes, begin, end)
            repeated += count_key(counts, mask, hash_of(document.codes, begin, end), begin) > 0
        at = following
    return lines, ellipses, repeated


@numba.njit(nogil=True)
def basic(document: DocumentLayout, limits: Numbers, counts: Counts) -> tuple[int, float]:
    characters, alphabetic = _words(document)
    hashes, ellipses = count_symbols(document.codes)
    lines, cut_off, repeated = _lines(document, counts)
    number = float(len(document.words))
    words, lines = max(len(document.words), 1), max(lines, 1)
    mean = characters / words
    values = (
        number, number, mean, mean, (hashes + ellipses) / words, cut_off / lines, alphabetic / words, repeated / lines
    )  # fmt: skip
    return first_broken(values, limits, _IS_MINIMUM)


@numba.njit(nogil=True)
def _newline_lines(document: DocumentLayout, longest_short: float, counts: Counts) -> tuple[int, int, int, int]:
    """(lines that are not blank, lines that end a sentence, short lines, characters of duplicate lines)."""
    codes, bits = document.codes, document.bits
    mask = empty_table(counts, len(codes))
    lines = punctuated = short = characters = at = ZERO
    while at < len(codes):
        end, blank = at, True
        while end < len(codes) and codes[end] != NEWLINE:
            blank &= bits[end] & SPACE != 0
            end += 1
        if not blank:
            lines += 1
            punctuated += bits[end - 1] & TERMINAL != 0
            short += end - at <= longest_short
            if count_key(counts, mask, hash_of(codes, at, end), at):
                characters += end - at
        at = end + 1
    return lines, punctuated, short, characters


@numba.njit(nogil=True)
def fineweb(document: DocumentLayout, limits: Numbers, counts: Counts) -> tuple[int, float]:
    """limits[4]: the length of a short line. limits[5]: 1 to keep documents without any punctuated line."""
    newlines = 0
    for code in document.codes:
        newlines += code == NEWLINE
    lines, punctuated, short, characters = _newline_lines(document, limits[4], counts)
    if not lines:
        return EMPTY, 0.0
    if punctuated / lines < limits[0] and not (punctuated == 0 and limits[5] == 1):
        return 0, punctuated / lines
    if short / lines > limits[1]:
        return 1, short / lines
    repeated = characters / (len(document.codes) - newlines)
    if repeated > limits[2]:
        return 2, repeated
    if newlines / len(document.words) > limits[3]:
        return 3, newlines / len(document.words)
    return NONE, 0.0
