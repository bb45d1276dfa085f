"""Reduces the padding that best fit leaves: dissolves the emptiest sequences and splits their pieces into the others.

The unused end of a sequence is a hole; the largest holes are filled first. This continues until at most a thousandth of
all tokens is unused, or until a split would fill too little.

Shapes: P pieces, all shorter than a sequence, in S sequences; Q parts of pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from moray.pipelines.shared.arrays import Indices

_TOKENS_PER_UNUSED = 1000  # one token in this many may stay unused
_SMALL_CUTS = 50  # one piece in this many may be split to fill holes of 2 or more tokens; after that,
_LARGE_HOLE = 100  # a hole must be at least 1 / this of a sequence


@dataclass(frozen=True)
class PackedBins:
    """Pieces as packed by best fit, int64.

    tokens [P]: length of each piece. sequence [P]: its sequence. at [P]: its offset there. free [S]: unused tokens of
    each sequence. length: tokens in a sequence.
    """

    tokens: Indices
    sequence: Indices
    at: Indices
    free: Indices
    length: int


@dataclass(frozen=True)
class PieceParts:
    """Whole pieces, and parts of split pieces, int64 [Q].

    Tokens [skipped, skipped + tokens) of `piece` are in `sequence` from offset `at`.
    """

    piece: Indices
    skipped: Indices
    tokens: Indices
    sequence: Indices
    at: Indices


class MovedPart(NamedTuple):
    """A part of a piece that was moved, with the fields of PieceParts."""

    piece: int
    skipped: int
    tokens: int
    sequence: int
    at: int


class Hole(NamedTuple):
    """Unused tokens [at, at + tokens) of a sequence."""

    sequence: int
    at: int
    tokens: int


class Holes:
    """The holes of the sequences in `order`, which goes from the largest hole to the smallest."""

    def __init__(self, bins: PackedBins, order: Iterator[int]) -> None:
        self._free, self._length, self._order = bins.free, bins.length, order
        self._sequence, self._unused = -1, 0  # the current hole; plain numbers, for speed

    def take(self, most: int, least: int) -> Hole | None:
        """Takes up to `most` tokens of the current hole. If that has less than `least`, moves to the next hole.

        Returns None if the next hole has less than `least` too, because later ones are no larger.
        """
        if self._unused < least:
            following = next(self._order, -1)
            if following < 0 or self._free[following] < least:
                return None
            self._sequence, self._unused = following, int(self._free[following])
        taken = Hole(self._sequence, self._length - self._unused, min(self._unused, most))
        self._unused -= taken.tokens
        return taken


def fill_holes(bins: PackedBins) -> tuple[PieceParts, int]:
    """(the new positions of pieces and their parts, the number of sequences that remain)."""
    emptied, moved = _empty_sequences(bins)
    return _without_emptied(bins, emptied, moved), len(bins.free) - len(emptied)


def _empty_sequences(bins: PackedBins) -> tuple[list[int], list[MovedPart]]:
    """(the emptied sequences, the new positions of the parts of their pieces)."""
    emptied: list[int] = []
    moved: list[MovedPart] = []
    unused, count = int(bins.free.sum()), len(bins.free)
    if _full_enough(unused, count, bins.length):
        return emptied, moved
    emptiest = iter(np.argsort(-bins.free, kind="stable").tolist())
    holes = Holes(bins, emptiest)  # shares the iterator: a sequence is either emptied or filled
    by_sequence = np.argsort(bins.sequence, kind="stable")
    bounds = np.searchsorted(bins.sequence[by_sequence], np.arange(count + 1))
    for sequence in emptiest:
        pieces = by_sequence[bounds[sequence] : bounds[sequence + 1]].tolist()
        parts = _move_pieces(pieces, bins, holes, len(moved))
        if parts is None:
            break
        moved += parts
        emptied.append(sequence)
        unused, count = unused - bins.length, count - 1
        if _full_enough(unused, count, bins.length):
            break
    return emptied, moved


def _full_enough(unused: int, count: int, length: int) -> bool:
    return unused <= max(length - 1, count * length // _TOKENS_PER_UNUSED)


def _move_pieces(pieces: Iterable[int], bins: PackedBins, holes: Holes, cuts: int) -> list[MovedPart] | None:
    """The pieces of one sequence, split to fill holes; None if there are too few holes. cuts: parts moved so far."""
    few, large = len(bins.tokens) // _SMALL_CUTS, max(2, bins.length // _LARGE_HOLE)
    parts: list[MovedPart] = []
    for piece in pieces:
        skipped, tokens = 0, int(bins.tokens[piece])
        while skipped < tokens:
            hole = holes.take(tokens - skipped, 2 if cuts + len(parts) < few else large)
            if hole is None:
                return None
            sequence, at, taken = hole
            parts.append(MovedPart(piece, skipped, taken, sequence, at))
            skipped += taken
    return parts


def _without_emptied(bins: PackedBins, emptied: Sequence[int], moved: Sequence[MovedPart]) -> PieceParts:
    """The pieces that were not moved, then the moved parts. Sequences are renumbered without the emptied ones."""
    pieces = len(bins.tokens)
    whole = PieceParts(np.arange(pieces), np.zeros(pieces, np.int64), bins.tokens, bins.sequence, bins.at)
    if not emptied:
        return whole
    kept = np.ones(len(bins.free), np.bool_)
    kept[list(emptied)] = False
    unmoved, number = kept[bins.sequence], np.cumsum(kept) - 1
    parts = MovedPart(*np.fromiter(chain.from_iterable(moved), np.int64).reshape(-1, len(MovedPart._fields)).T)
    return PieceParts(
        piece=np.concatenate([whole.piece[unmoved], parts.piece]),
        skipped=np.concatenate([whole.skipped[unmoved], parts.skipped]),
        tokens=np.concatenate([whole.tokens[unmoved], parts.tokens]),
        sequence=number[np.concatenate([whole.sequence[unmoved], parts.sequence])],
        at=np.concatenate([whole.at[unmoved], parts.at]),
    )
