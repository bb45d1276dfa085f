"""What is cut and what goes: one scan over all that is repeated, in keep order.

A piece (a line, a paragraph, a window of words) is cut if `copies` of it stand whole in what is kept before it. It
counts as standing when the scan has passed its end and nothing of it was cut, and it does so for good: so whatever is
cut, its copies stay, and pieces that overlap (windows do) cannot justify each other's end. A document that loses too
much goes as a whole, and its pieces stand no longer. What is repeated only within itself, as in a row of equal words,
overlaps with its own copy and stays.

Shapes: M pieces, D documents that have any, G distinct pieces.
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
    """All pieces that are repeated, by (document, begin). bounds: int64 [D + 1], which pieces are each document's; the
    others [M]: where a piece begins and ends, in characters and in words, and which of the G distinct ones it is."""

    bounds: Indices
    begins: Indices
    ends: Indices
    first_words: Indices
    end_words: Indices
    groups: Indices


class PieceVerdicts(NamedTuple):
    """cut: of each piece [M] whether; of each document [D] the verdict (0: whole), how many characters are cut, in how
    many spans, and which document, by its place among D, has the first copy of the first piece that is cut, or -1."""

    cut: Flags
    verdicts: Indices
    lost: Indices
    spans: Indices
    partners: Indices


class _Standing(NamedTuple):
    """copies: [G], how many of each distinct piece stand so far; holders: [G], the document that has the first of
    them; stands: [M], whether a piece counts among them."""

    copies: npt.NDArray[np.int32]
    holders: Indices
    stands: Flags


def scan_pieces(
    pieces: RepeatedPieces, lengths: Indices, words: Indices, copies: int, max_loss: float, min_words: int
) -> PieceVerdicts:
    """lengths (in characters), words: int64 [D]."""
    count, documents = len(pieces.begins), len(pieces.bounds) - 1
    groups = int(pieces.groups.max()) + 1 if count else 0
    found = PieceVerdicts(np.zeros(count, np.bool_), *(np.zeros(documents, np.int64) for _ in range(4)))
    standing = _Standing(np.zeros(groups, np.int32), np.full(groups, -1, np.int64), np.zeros(count, np.bool_))
    _scan(pieces, standing, found, lengths, words, copies, max_loss, min_words)
    return found


@numba.njit(nogil=True, cache=True)
def _scan(
    pieces: RepeatedPieces,
    standing: _Standing,
    found: PieceVerdicts,
    lengths: Indices,
    words: Indices,
    copies: int,
    max_loss: float,
    min_words: int,
) -> None:
    for d in range(len(pieces.bounds) - 1):
        left = words[d] - _scan_document(d, pieces, standing, found, copies)
        if found.lost[d] == 0:
            continue
        if left <= 0:
            found.verdicts[d] = NOTHING_LEFT
        elif found.lost[d] > max_loss * lengths[d]:
            found.verdicts[d] = TOO_MUCH_LOST
        elif left < min_words:
            found.verdicts[d] = TOO_LITTLE_LEFT
        else:
            found.verdicts[d] = EDITED
            continue
        for i in range(pieces.bounds[d], pieces.bounds[d + 1]):
            if standing.stands[i]:
                standing.copies[pieces.groups[i]] -= 1


@numba.njit(nogil=True, cache=True)
def _scan_document(d: int, pieces: RepeatedPieces, standing: _Standing, found: PieceVerdicts, copies: int) -> int:
    """Cuts those of document d's pieces of which enough copies stand before it; the number of words in them."""
    begin, end = pieces.bounds[d], pieces.bounds[d + 1]
    passed, cut_end, cut_word, lost_words = begin, 0, 0, 0
    found.partners[d] = -1
    for i in range(begin, end + 1):
        while passed < i and (i == end or pieces.ends[passed] <= pieces.begins[i]):
            if pieces.begins[passed] >= cut_end:  # what was cut so far begins before its end, so nothing of it was
                group = pieces.groups[passed]
                if standing.copies[group] == 0:
                    standing.holders[group] = d
                standing.copies[group] += 1
                standing.stands[passed] = True
            passed += 1
        if i == end or standing.copies[pieces.groups[i]] < copies:
            continue
        if not found.spans[d]:
            found.partners[d] = standing.holders[pieces.groups[i]]
        if not found.spans[d] or pieces.begins[i] > cut_end:
            found.spans[d] += 1
        found.cut[i] = True
        found.lost[d] += pieces.ends[i] - max(pieces.begins[i], cut_end)
        lost_words += pieces.end_words[i] - max(pieces.first_words[i], cut_word)
        cut_end, cut_word = pieces.ends[i], pieces.end_words[i]
    return lost_words
