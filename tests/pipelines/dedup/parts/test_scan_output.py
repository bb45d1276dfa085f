"""Cut pieces become spans. test_step.py compares the whole step with its definition."""

from __future__ import annotations

import numpy as np

from moray.pipelines.dedup.parts.scan import EDITED, TOO_MUCH_LOST, RepeatedPieces, ScanDecisions
from moray.pipelines.dedup.parts.scan_input import ScanInput
from moray.pipelines.dedup.parts.scan_output import merge_cuts


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_overlapping_and_adjacent_pieces_of_a_kept_document_are_one_span() -> None:
    begins, ends = numbers(0, 4, 8, 20, 0, 3, 5), numbers(5, 8, 9, 25, 5, 7, 9)
    none = np.zeros_like(begins)
    pieces = RepeatedPieces(numbers(0, 4, 5, 7), begins, ends, none, none, none)
    scan = ScanInput(pieces, row_D=numbers(9, 5, 2), length_D=numbers(30, 30, 30), words_D=numbers(9, 9, 9))
    cut = np.array([True, True, False, True, True, True, True])
    found = ScanDecisions(cut, numbers(EDITED, TOO_MUCH_LOST, EDITED), numbers(13, 5, 4), none[:3], none[:3])
    spans = merge_cuts(scan, found)
    assert spans.row_S.tolist() == [2, 9, 9]
    assert spans.begin_S.tolist() == [3, 0, 20]
    assert spans.end_S.tolist() == [9, 8, 25]


def test_nothing_cut_is_no_span() -> None:
    none = numbers()
    scan = ScanInput(RepeatedPieces(numbers(0), none, none, none, none, none), none, none, none)
    spans = merge_cuts(scan, ScanDecisions(none.astype(np.bool_), none, none, none, none))
    assert [len(column) for column in spans] == [0, 0, 0]
