"""All families of rules over a batch of texts in Arrow's memory, each document read once; compiled by numba.

A document passes the families in the order of the recipe, up to the first limit that it breaks; after C4's, which take
lines out, it is the shorter one.

Shapes: N documents, F families, L limits of the family that has most.
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
    """families: int64 [F], by the numbers above; limits: [5, L], and how many of them, by family. Gopher's stop words
    and C4's phrases: their characters, one after another, and where each begins, with the end of the last."""

    families: Places
    limits: Numbers
    sizes: Places
    stop_words: Codes
    stop_word_bounds: Places
    phrases: Codes
    phrase_bounds: Places


class RuleResults(NamedTuple):
    """family and limit that a document breaks (NONE: it stays; EMPTY: nothing is there), and its value [N]; and the
    texts as they are after the rules: bytes, and where each ends [N + 1]."""

    families: npt.NDArray[np.int8]
    limits: npt.NDArray[np.int8]
    values: Numbers
    text: Bytes
    ends: Places


def allocate_buffers(longest: int) -> tuple[DocumentLayout, DocumentLayout, Counts]:
    """Memory for a document of so many bytes, for what C4 leaves of it, and to count in."""
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
    """Of words, one after another, as find_words makes them."""
    hashes = np.empty(len(bounds) - 1, np.uint64)
    for i in range(len(hashes)):
        hashes[i] = hash_of(codes, bounds[i], bounds[i + 1])
    return hashes


@numba.njit(nogil=True)
def _read(room: DocumentLayout, codes: Codes, bits: Bytes) -> DocumentLayout:
    """The document of these characters, its words in `room`."""
    words = find_words(codes, bits, len(codes), room.begins, room.ends, room.words)
    return DocumentLayout(codes, bits, room.begins[:words], room.ends[:words], room.words[:words])


@numba.njit(nogil=True)
def _check_document(
    document: DocumentLayout,
    rules: RuleArrays,
    stop_words: Hashes,
    room: DocumentLayout,
    edited: DocumentLayout | None,
    counts: Counts,
) -> tuple[int, int, float, DocumentLayout]:
    """(family, limit, value, the document as it is now)."""
    if edited is None:  # numba knows this by type: the basic rules alone are compiled, in a third of the time
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
            document = _read(room, edited.codes[begin:end], edited.bits[begin:end])
        if limit != NONE:
            return family, limit, value, document
    return NONE, NONE, 0.0, document


@numba.njit(nogil=True, cache=True)
def check_texts(
    offsets: Places,
    data: Bytes,
    table: Bytes,
    rules: RuleArrays,
    room: DocumentLayout,
    edited: DocumentLayout | None,
    counts: Counts,
    verdicts: RuleResults,
    write: bool,
) -> None:
    """Fills `verdicts`, the texts only where `write` is true. offsets: int64 [N + 1] into `data`, valid UTF-8.

    room, edited, counts: of `allocate_buffers`; `edited` is None where the basic rules are the only ones.
    """
    stop_words = _hashes(rules.stop_words, rules.stop_word_bounds)
    at = ZERO
    for n in range(len(offsets) - 1):
        length = decode_layout(data, offsets[n], offsets[n + 1], table, room.codes, room.bits)
        document = _read(room, room.codes[:length], room.bits[:length])
        family, limit, value, document = _check_document(document, rules, stop_words, room, edited, counts)
        verdicts.families[n], verdicts.limits[n], verdicts.values[n] = family, limit, value
        if write and family == NONE:
            at = encode(document.codes, len(document.codes), verdicts.text, at)
        verdicts.ends[n + 1] = at
