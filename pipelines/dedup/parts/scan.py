"""The scan that decides which repeated pieces are cut and which documents are removed, in priority order.

A piece is a line, a paragraph or a window of words. A piece is cut if at least `copies` intact occurrences of it are
kept before it. An occurrence counts as intact once the scan has passed its end and no part of it was cut, and then it
is never cut. So every piece that is cut keeps its copies, and overlapping pieces (windows overlap) cannot cause each
other's removal. A document that loses too much is removed, and its pieces no longer count. A repeat that overlaps with
itself, as in a run of equal words, is kept.

Shapes: M pieces, D documents with pieces, G distinct pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.shared.arrays import Flags, Indices

EDITED, NOTHING_LEFT, TOO_MUCH_LOST, TOO_LITTLE_LEFT = 1, 2, 3, 4
REASONS = {NOTHING_LEFT: "nothing_left", TOO_MUCH_LOST: "too_much_lost", TOO_LITTLE_LEFT: "too_little_left"}


class RepeatedPieces(NamedTuple):
    """All repeated pieces, sorted by (document, begin).

    bounds: int64 [D + 1], the pieces of document d are bounds[d] : bounds[d + 1]. begins, ends: [M], in characters.
    first_words, end_words: [M], the same in words. groups: [M], the number of the distinct piece, 0 to G - 1.
    """

    bounds: Indices
    begins: Indices
    ends: Indices
    first_words: Indices
    end_words: Indices
    groups: Indices


class ScanDecisions(NamedTuple):
    """The result of the scan.

    cut: [M], whether each piece is cut. decisions: [D], 0 (unchanged), EDITED or a key of REASONS. lost: [D], cut
    characters. spans: [D], cut spans. partners: [D], the document, as a place among D, with the first copy of the first
    piece that is cut, or -1.
    """

    cut: Flags
    decisions: Indices
    lost: Indices
    spans: Indices
    partners: Indices


class _Intact(NamedTuple):
    """Intact occurrences so far. copies: [G], their number. first_documents: [G], the document with the first one.
    counted: [M], whether a piece is one of them."""

    copies: npt.NDArray[np.int32]
    first_documents: Indices
    counted: Flags


def scan_pieces(
    pieces: RepeatedPieces, lengths: Indices, words: Indices, copies: int, max_loss: float, min_words: int
) -> ScanDecisions:
    """Scans all documents. lengths: in characters, int64 [D]. words: words per document, int64 [D]."""
    count, documents = len(pieces.begins), len(pieces.bounds) - 1
    groups = int(pieces.groups.max()) + 1 if count else 0
    found = ScanDecisions(np.zeros(count, np.bool_), *(np.zeros(documents, np.int64) for _ in range(4)))
    intact = _Intact(np.zeros(groups, np.int32), np.full(groups, -1, np.int64), np.zeros(count, np.bool_))
    _scan(pieces, intact, found, lengths, words, copies, max_loss, min_words)
    return found


@numba.njit(nogil=True, cache=True)
def _scan(
    pieces: RepeatedPieces,
    intact: _Intact,
    found: ScanDecisions,
    lengths: Indices,
    words: Indices,
    copies: int,
    max_loss: float,
    min_words: int,
) -> None:
    for d in range(len(pieces.bounds) - 1):
        left = words[d] - _scan_document(d, pieces, intact, found, copies)
        if found.lost[d] == 0:
            continue
        if left <= 0:
            found.decisions[d] = NOTHING_LEFT
        elif found.lost[d] > max_loss * lengths[d]:
            found.decisions[d] = TOO_MUCH_LOST
        elif left < min_words:
            found.decisions[d] = TOO_LITTLE_LEFT
        else:
            found.decisions[d] = EDITED
            continue
        for i in range(pieces.bounds[d], pieces.bounds[d + 1]):
            if intact.counted[i]:
                intact.copies[pieces.groups[i]] -= 1


@numba.njit(nogil=True, cache=True)
def _scan_document(d: int, pieces: RepeatedPieces, intact: _Intact, found: ScanDecisions, copies: int) -> int:
    """Cuts the pieces of document d with enough intact copies before them. Returns the number of words cut."""
    begin, end = pieces.bounds[d], pieces.bounds[d + 1]
    passed, cut_end, cut_word, lost_words = begin, 0, 0, 0
    found.partners[d] = -1
    for i in range(begin, end + 1):
        while passed < i and (i == end or pieces.ends[passed] <= pieces.begins[i]):
            if pieces.begins[passed] >= cut_end:  # all cuts so far end before this piece, so it is intact
                group = pieces.groups[passed]
                if intact.copies[group] == 0:
                    intact.first_documents[group] = d
                intact.copies[group] += 1
                intact.counted[passed] = True
            passed += 1
        if i == end or intact.copies[pieces.groups[i]] < copies:
            continue
        if not found.spans[d]:
            found.partners[d] = intact.first_documents[pieces.groups[i]]
        if not found.spans[d] or pieces.begins[i] > cut_end:
            found.spans[d] += 1
        found.cut[i] = True
        found.lost[d] += pieces.ends[i] - max(pieces.begins[i], cut_end)
        lost_words += pieces.end_words[i] - max(pieces.first_words[i], cut_word)
        cut_end, cut_word = pieces.ends[i], pieces.end_words[i]
    return lost_words
