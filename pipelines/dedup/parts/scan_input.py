"""What the scan of repeated pieces is given, from the files of the ranges.

Shapes: M repeated pieces in D documents, of N in the corpus.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moray.pipelines.dedup.keep_order import KeepOrder
from moray.pipelines.dedup.parts.key_ranges import Columns
from moray.pipelines.dedup.parts.scan import RepeatedPieces
from moray.pipelines.dedup.parts.tasks import SPOT, Folders
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.grouped_file import read_columns


class ScanInput(NamedTuple):
    """All repeated pieces, and the documents that have them in keep order: their rows among the N, their lengths in
    characters and in words."""

    pieces: RepeatedPieces
    row_D: Indices
    length_D: Indices
    words_D: Indices


def read_scan_input(folders: Folders, ranges: int, order: KeepOrder) -> ScanInput:
    """The pieces of all ranges, by (document, begin)."""
    found = _join_ranges([read_columns(folders.range("repeated", number), 0) for number in range(ranges)])
    # Of each piece, its document's place in keep order, 0 .. N - 1.
    place_M: Indices = order.places[order.firsts[found["file"]] + found["row"]]
    # Of each place in the sorted list, the piece. Both keys are one number: texts have fewer than 2^31 characters.
    sorted_M = np.argsort(place_M << 31 | found["begin"])
    # Of each document that has pieces, its place in keep order and its first piece in the sorted list.
    place_D, first_D = np.unique(place_M[sorted_M], return_index=True)
    pieces = RepeatedPieces(
        bounds=np.append(first_D, len(sorted_M)).astype(np.int64),
        begins=found["begin"][sorted_M],
        ends=found["end"][sorted_M],
        first_words=found["first_word"][sorted_M],
        end_words=found["end_word"][sorted_M],
        groups=found["group"][sorted_M],
    )
    row_D = order.order[place_D]
    length_D, words_D = (order.table[name].to_numpy()[row_D] for name in ("length", "words"))
    return ScanInput(pieces, row_D, length_D, words_D)


def _join_ranges(ranges: list[Columns]) -> Columns:
    """Columns of all ranges, one after another. Groups, which each range counts from 0, get numbers of their own."""
    groups = 0
    for columns in ranges:
        number: Indices = columns["group"].astype(np.int64)
        columns["group"] = number + groups
        groups += int(number.max(initial=-1)) + 1
    return {name: np.concatenate([columns[name] for columns in ranges]) for name in (*SPOT, "file", "group")}
