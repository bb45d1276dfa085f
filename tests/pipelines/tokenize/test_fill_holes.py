"""Holes: emptied sequences, moved pieces, and when nothing is moved. test_sequence_packing.py has the laws."""

from __future__ import annotations

import numpy as np

from moray.pipelines.tokenize.fill_holes import Hole, Holes, PackedBins, fill_holes


def bins(tokens: list[int], length: int) -> PackedBins:
    """Each piece in a sequence of its own."""
    pieces = np.array(tokens, np.int64)
    return PackedBins(pieces, np.arange(len(pieces)), np.zeros_like(pieces), length - pieces, length)


def test_the_emptiest_sequence_fills_the_others() -> None:
    parts, count = fill_holes(bins([8, 5, 3, 6], 10))
    assert count == 3
    found = zip(parts.piece, parts.skipped, parts.tokens, parts.sequence, parts.at, strict=True)
    assert [tuple(map(int, part)) for part in found] == [
        (0, 0, 8, 0, 0),
        (1, 0, 5, 1, 0),
        (3, 0, 6, 2, 0),
        (2, 0, 3, 1, 5),
    ]


def test_full_sequences_are_unchanged() -> None:
    parts, count = fill_holes(bins([10, 9, 10], 10))
    assert count == 3
    assert parts.sequence.tolist() == [0, 1, 2]
    assert parts.skipped.tolist() == [0, 0, 0]


def test_holes_are_filled_one_after_another_until_one_is_too_small() -> None:
    holes = Holes(bins([4, 6, 9], 10), iter([0, 1, 2]))
    assert holes.take(4, 2) == Hole(0, 4, 4)
    assert holes.take(5, 2) == Hole(0, 8, 2)
    assert holes.take(9, 2) == Hole(1, 6, 4)
    assert holes.take(1, 2) is None
