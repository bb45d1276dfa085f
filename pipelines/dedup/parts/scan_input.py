"""The input of the scan of repeated pieces, read from the files of all ranges.

Shapes: M repeated pieces in D documents, of N in the corpus.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moray.pipelines.dedup.parts.key_ranges import Columns
from moray.pipelines.dedup.parts.scan import RepeatedPieces
from moray.pipelines.dedup.parts.tasks import SPOT, Folders
from moray.pipelines.dedup.priority_order import PriorityOrder
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.grouped_file import read_columns


class ScanInput(NamedTuple):
    """All repeated pieces, and the documents that have any, in priority order. row_D: their rows among the N documents.
    length_D, words_D: their lengths in characters and in words."""

    pieces: RepeatedPieces
    row_D: Indices
    length_D: Indices
    words_D: Indices


def read_scan_input(folders: Folders, ranges: int, order: PriorityOrder) -> ScanInput:
    """Reads the pieces of all ranges and sorts them by (document, begin)."""
    found = _join_ranges([read_columns(folders.range("repeated", number), 0) for number in range(ranges)])
    # The place of each piece's document in priority order, 0 .. N - 1.
    place_M: Indices = order.places[order.firsts[found["file"]] + found["row"]]
    # Sort by (place, begin) as one number: texts have fewer than 2^31 characters.
    sorted_M = np.argsort(place_M << 31 | found["begin"])
    # For each document with pieces, its place in priority order and its first piece in the sorted list.
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
    """Concatenates the columns of all ranges. Groups, numbered from 0 in each range, become unique numbers."""
    groups = 0
    for columns in ranges:
        number: Indices = columns["group"].astype(np.int64)
        columns["group"] = number + groups
        groups += int(number.max(initial=-1)) + 1
    return {name: np.concatenate([columns[name] for columns in ranges]) for name in (*SPOT, "file", "group")}
