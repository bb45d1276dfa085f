"""Fills what best fit leaves unused: it empties the emptiest sequences, and cuts their pieces to fit into the others.

The unused end of a sequence is a hole; the largest holes are filled first. This goes on until a thousandth of all
tokens, or less, is unused. It stops where a cut would fill too little.

Shapes: P pieces, all shorter than a sequence, in S sequences; Q parts of pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from moray.pipelines.shared.arrays import Indices

_TOKENS_PER_UNUSED = 1000  # of so many tokens, one may be unused
_SMALL_CUTS = 50  # one piece in so many may be cut to fill a hole of any size from 2 tokens on; beyond that,
_LARGE_HOLE = 100  # a hole must be this part of a sequence


@dataclass(frozen=True)
class PackedBins:
    """Pieces as best fit packed them, int64.

    tokens [P]: of each piece; sequence, at [P]: its sequence, and its place there; room [S]: unused tokens of each
    sequence; length: tokens that a sequence can hold.
    """

    tokens: Indices
    sequence: Indices
    at: Indices
    room: Indices
    length: int


@dataclass(frozen=True)
class PieceParts:
    """Whole pieces and parts of cut ones, int64 [Q].

    Tokens `skipped` .. `skipped + tokens` of `piece` lie in `sequence` from `at`.
    """

    piece: Indices
    skipped: Indices
    tokens: Indices
    sequence: Indices
    at: Indices


class MovedPart(NamedTuple):
    """One part of a piece that was moved, with the fields of PieceParts."""

    piece: int
    skipped: int
    tokens: int
    sequence: int
    at: int


class Hole(NamedTuple):
    """Unused tokens `at` .. `at + tokens` of a sequence."""

    sequence: int
    at: int
    tokens: int


class Holes:
    """The holes of sequences that `order` names, one after another."""

    def __init__(self, bins: PackedBins, order: Iterator[int]) -> None:
        self._room, self._length, self._order = bins.room, bins.length, order
        self._sequence, self._unused = -1, 0  # of the hole that is open; plain numbers, for speed

    def take(self, wanted: int, least: int) -> Hole | None:
        """`wanted` tokens of the open hole, or all that it has; a hole of less than `least` is left for the next one.

        None if the next one has less too: those after it are no larger.
        """
        if self._unused < least:
            following = next(self._order, -1)
            if following < 0 or self._room[following] < least:
                return None
            self._sequence, self._unused = following, int(self._room[following])
        taken = Hole(self._sequence, self._length - self._unused, min(self._unused, wanted))
        self._unused -= taken.tokens
        return taken


def fill_holes(bins: PackedBins) -> tuple[PieceParts, int]:
    """Where pieces lie when sequences are full enough, or no hole is worth a cut; and how many sequences are left."""
    emptied, moved = _empty_sequences(bins)
    return _without_emptied(bins, emptied, moved), len(bins.room) - len(emptied)


def _empty_sequences(bins: PackedBins) -> tuple[list[int], list[MovedPart]]:
    """The sequences that are emptied, and where the parts of their pieces go."""
    emptied: list[int] = []
    moved: list[MovedPart] = []
    unused, count = int(bins.room.sum()), len(bins.room)
    if _full_enough(unused, count, bins.length):
        return emptied, moved
    emptiest = iter(np.argsort(-bins.room, kind="stable").tolist())
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
    """The pieces of one sequence, cut to fill holes, or None if these run out. cuts: parts that were moved before."""
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
    """Pieces that stay where they are, then parts that were moved; sequences are numbered without the emptied ones."""
    pieces = len(bins.tokens)
    whole = PieceParts(np.arange(pieces), np.zeros(pieces, np.int64), bins.tokens, bins.sequence, bins.at)
    if not emptied:
        return whole
    left = np.ones(len(bins.room), np.bool_)
    left[list(emptied)] = False
    stays, number = left[bins.sequence], np.cumsum(left) - 1
    parts = MovedPart(*np.fromiter(chain.from_iterable(moved), np.int64).reshape(-1, len(MovedPart._fields)).T)
    return PieceParts(
        piece=np.concatenate([whole.piece[stays], parts.piece]),
        skipped=np.concatenate([whole.skipped[stays], parts.skipped]),
        tokens=np.concatenate([whole.tokens[stays], parts.tokens]),
        sequence=number[np.concatenate([whole.sequence[stays], parts.sequence])],
        at=np.concatenate([whole.at[stays], parts.at]),
    )
