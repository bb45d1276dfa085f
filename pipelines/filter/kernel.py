"""The kernel of the rules: it applies all families to a batch of texts in Arrow memory. Compiled by numba.

Each document is read once. Families are applied in the order of the recipe, up to the first broken limit. Families
after C4 receive the document without the lines that C4 removed.

Shapes: N documents, F families, L the largest number of limits of a family.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.filter.c4 import c4
from moray.pipelines.filter.document_layout import (
    EMPTY,
    NONE,
    ZERO,
    Bytes,
    Codes,
    Counts,
    DocumentLayout,
    Hashes,
    Numbers,
    Places,
    counts_for,
    decode_layout,
    encode,
    find_words,
    hash_of,
)
from moray.pipelines.filter.gopher import quality, repetition
from moray.pipelines.filter.lines import basic, fineweb

BASIC, QUALITY, REPETITION, C4, FINEWEB = range(5)


class RuleArrays(NamedTuple):
    """The rules as arrays. families: int64 [F], the numbers above. limits: [5, L]. sizes: [5], limits per family.

    stop_words (of Gopher), phrases (of C4): characters, concatenated. stop_word_bounds, phrase_bounds: the begin of
    each word or phrase, and the end of the last.
    """

    families: Places
    limits: Numbers
    sizes: Places
    stop_words: Codes
    stop_word_bounds: Places
    phrases: Codes
    phrase_bounds: Places


class RuleResults(NamedTuple):
    """The output. families, limits, values: the first broken limit of each document and its value, [N]; NONE: the
    document is kept, EMPTY: no text is left. text, ends: the texts after the rules, UTF-8, and their ends, [N + 1]."""

    families: npt.NDArray[np.int8]
    limits: npt.NDArray[np.int8]
    values: Numbers
    text: Bytes
    ends: Places


def allocate_buffers(longest: int) -> tuple[DocumentLayout, DocumentLayout, Counts]:
    """Buffers for a document of up to `longest` bytes: its layout, the text that C4 leaves of it, and counts."""
    characters = longest + 1
    documents = [
        DocumentLayout(
            np.zeros(characters, np.uint32),
            np.zeros(characters, np.uint8),
            np.zeros(words, np.int64),
            np.zeros(words, np.int64),
            np.zeros(words, np.uint64),
        )
        for words in (characters // 2 + 1, 0)
    ]
    return documents[0], documents[1], counts_for(characters + 1)


@numba.njit(nogil=True)
def _hashes(codes: Codes, bounds: Places) -> Hashes:
    """Hashes of concatenated words, equal to those of `find_words`."""
    hashes = np.empty(len(bounds) - 1, np.uint64)
    for i in range(len(hashes)):
        hashes[i] = hash_of(codes, bounds[i], bounds[i + 1])
    return hashes


@numba.njit(nogil=True)
def _read(buffer: DocumentLayout, codes: Codes, bits: Bytes) -> DocumentLayout:
    """The layout of these characters. Its words are written to `buffer`."""
    words = find_words(codes, bits, len(codes), buffer.begins, buffer.ends, buffer.words)
    return DocumentLayout(codes, bits, buffer.begins[:words], buffer.ends[:words], buffer.words[:words])


@numba.njit(nogil=True)
def _check_document(
    document: DocumentLayout,
    rules: RuleArrays,
    stop_words: Hashes,
    buffer: DocumentLayout,
    edited: DocumentLayout | None,
    counts: Counts,
) -> tuple[int, int, float, DocumentLayout]:
    """(family, limit, value, the document after the rules)."""
    if edited is None:  # numba specializes on the type: only the basic rules are compiled, in a third of the time
        limit, value = basic(document, rules.limits[BASIC, : rules.sizes[BASIC]], counts)
        return (NONE if limit == NONE else BASIC), limit, value, document
    for family in rules.families:
        limits = rules.limits[family, : rules.sizes[family]]
        limit, value = NONE, 0.0
        if family == BASIC:
            limit, value = basic(document, limits, counts)
        elif len(document.codes) == 0:
            limit = EMPTY
        elif family == QUALITY:
            limit, value = quality(document, limits, stop_words)
        elif family == REPETITION:
            limit, value = repetition(document, limits, counts)
        elif family == FINEWEB:
            limit, value = fineweb(document, limits, counts)
        else:
            limit, value, begin, end = c4(document, limits, rules.phrases, rules.phrase_bounds, edited)
            document = _read(buffer, edited.codes[begin:end], edited.bits[begin:end])
        if limit != NONE:
            return family, limit, value, document
    return NONE, NONE, 0.0, document


@numba.njit(nogil=True, cache=True)
def check_texts(
    offsets: Places,
    data: Bytes,
    table: Bytes,
    rules: RuleArrays,
    buffer: DocumentLayout,
    edited: DocumentLayout | None,
    counts: Counts,
    results: RuleResults,
    write: bool,
) -> None:
    """Writes `results`; texts only if `write` is true. offsets: int64 [N + 1] into `data`, valid UTF-8.

    buffer, edited, counts: from `allocate_buffers`. `edited` is None if only the basic rules are applied.
    """
    stop_words = _hashes(rules.stop_words, rules.stop_word_bounds)
    at = ZERO
    for n in range(len(offsets) - 1):
        length = decode_layout(data, offsets[n], offsets[n + 1], table, buffer.codes, buffer.bits)
        document = _read(buffer, buffer.codes[:length], buffer.bits[:length])
        family, limit, value, document = _check_document(document, rules, stop_words, buffer, edited, counts)
        results.families[n], results.limits[n], results.values[n] = family, limit, value
        if write and family == NONE:
            at = encode(document.codes, len(document.codes), results.text, at)
        results.ends[n + 1] = at
