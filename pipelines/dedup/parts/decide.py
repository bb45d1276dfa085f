"""What is cut and what goes: one scan over all that is repeated, in keep order.

A piece (a line, a paragraph, a window of words) is cut if `copies` of it stand whole in what is kept before it. It
counts as standing when the scan has passed its end and nothing of it was cut, and it does so for good: so whatever is
cut, its copies stay, and pieces that overlap (windows do) cannot justify each other's end. A document that loses too
much goes as a whole, and its pieces stand no longer. What is repeated only within itself, as in a row of equal words,
overlaps with its own copy and stays.

Shapes: M pieces, D documents that have any, G distinct pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.shared.arrays import Indices

Flags = npt.NDArray[np.bool_]
EDITED, NOTHING_LEFT, TOO_MUCH_LOST, TOO_LITTLE_LEFT = 1, 2, 3, 4
REASONS = {NOTHING_LEFT: "nothing_left", TOO_MUCH_LOST: "too_much_lost", TOO_LITTLE_LEFT: "too_little_left"}


@dataclass(frozen=True)
class RepeatedPieces:
    """All that is repeated, by (document, begin). bounds: int64 [D + 1], which pieces are each document's; the others
    [M]: where a piece begins and ends, in characters and in words, and which of the G distinct ones it is."""

    bounds: Indices
    begins: Indices
    ends: Indices
    first_words: Indices
    end_words: Indices
    groups: Indices


@dataclass(frozen=True)
class PieceVerdicts:
    """cut: of each piece [M] whether; of each document [D] the verdict (0: whole), how many characters are cut, in how
    many spans, and which document, by its place among D, has the first copy of the first piece that is cut, or -1."""

    cut: Flags
    verdicts: Indices
    lost: Indices
    spans: Indices
    partners: Indices


def scan_pieces(
    pieces: RepeatedPieces, lengths: Indices, words: Indices, copies: int, max_loss: float, min_words: int
) -> PieceVerdicts:
    """lengths (in characters), words: int64 [D]."""
    count, documents = len(pieces.begins), len(pieces.bounds) - 1
    groups = int(pieces.groups.max()) + 1 if count else 0
    found = PieceVerdicts(np.zeros(count, np.bool_), *(np.zeros(documents, np.int64) for _ in range(4)))
    standing, holders = np.zeros(groups, np.int32), np.full(groups, -1, np.int64)
    stands = np.zeros(count, np.bool_)
    for_all = (pieces.begins, pieces.ends, pieces.first_words, pieces.end_words, pieces.groups)
    _scan(
        pieces.bounds, *for_all, lengths, words, copies, max_loss, min_words, standing, holders, stands, found.cut,
        found.verdicts, found.lost, found.spans, found.partners,
    )  # fmt: skip
    return found


@numba.njit(nogil=True, cache=True)
def _scan(
    bounds: Indices, begins: Indices, ends: Indices, first_words: Indices, end_words: Indices, groups: Indices,
    lengths: Indices, words: Indices, copies: int, max_loss: float, min_words: int, standing: npt.NDArray[np.int32],
    holders: Indices, stands: Flags, cut: Flags, verdicts: Indices, lost: Indices, spans: Indices, partners: Indices,
) -> None:  # fmt: skip
    for d in range(len(bounds) - 1):
        lost_words = _scan_document(
            d, bounds[d], bounds[d + 1], begins, ends, first_words, end_words, groups, copies, standing, holders,
            stands, cut, lost, spans, partners,
        )  # fmt: skip
        left = words[d] - lost_words
        if lost[d] == 0:
            continue
        if left <= 0:
            verdicts[d] = NOTHING_LEFT
        elif lost[d] > max_loss * lengths[d]:
            verdicts[d] = TOO_MUCH_LOST
        elif left < min_words:
            verdicts[d] = TOO_LITTLE_LEFT
        else:
            verdicts[d] = EDITED
            continue
        for i in range(bounds[d], bounds[d + 1]):
            if stands[i]:
                standing[groups[i]] -= 1


@numba.njit(nogil=True, cache=True)
def _scan_document(
    d: int, begin: int, end: int, begins: Indices, ends: Indices, first_words: Indices, end_words: Indices,
    groups: Indices, copies: int, standing: npt.NDArray[np.int32], holders: Indices, stands: Flags, cut: Flags,
    lost: Indices, spans: Indices, partners: Indices,
) -> int:  # fmt: skip
    """Cuts of document d's pieces [begin, end) what stands before; how many words that are."""
    passed, cut_end, cut_word, lost_words = begin, 0, 0, 0
    partners[d] = -1
    for i in range(begin, end + 1):
        while passed < i and (i == end or ends[passed] <= begins[i]):
            if begins[passed] >= cut_end:  # what was cut so far begins before its end, so nothing of it was
                group = groups[passed]
                if standing[group] == 0:
                    holders[group] = d
                standing[group] += 1
                stands[passed] = True
            passed += 1
        if i == end or standing[groups[i]] < copies:
            continue
        if not spans[d]:
            partners[d] = holders[groups[i]]
        if not spans[d] or begins[i] > cut_end:
            spans[d] += 1
        cut[i] = True
        lost[d] += ends[i] - max(begins[i], cut_end)
        lost_words += end_words[i] - max(first_words[i], cut_word)
        cut_end, cut_word = ends[i], end_words[i]
    return lost_words
