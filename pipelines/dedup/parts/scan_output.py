"""What the scan of repeated pieces decided, in two files for each shard, from which the shard is written again.

`cuts` has the spans to cut from documents that stay: row in the shard, begin, end. `verdicts` has every document that
loses anything, with the reason if it goes as a whole.

Shapes: M repeated pieces in D documents; C of the pieces are cut, in S spans; L documents lose anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moray.pipelines.dedup.keep_order import KeepOrder
from moray.pipelines.dedup.parts.scan import EDITED, REASONS, PieceVerdicts
from moray.pipelines.dedup.parts.scan_input import ScanInput
from moray.pipelines.dedup.parts.tasks import Folders
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.shards import Row


class CutSpans(NamedTuple):
    """Characters to cut, by (row, begin); a row is a document's among all of the corpus."""

    row_S: Indices
    begin_S: Indices
    end_S: Indices


def write_scan_output(
    shards: Sequence[Row], folders: Folders, order: KeepOrder, scan: ScanInput, found: PieceVerdicts
) -> None:
    """Writes `cuts` and `verdicts` of each shard, ascending by row."""
    spans = merge_cuts(scan, found)
    # The documents that lose anything, by their number among D, ascending by row.
    losing_L = np.flatnonzero(found.verdicts > 0)
    losing_L = losing_L[np.argsort(scan.row_D[losing_L])]
    ids = order.table["id"].combine_chunks()
    spans_of, losing_of = _by_shard(spans.row_S, order), _by_shard(scan.row_D[losing_L], order)
    for shard, first, own, losing in zip(shards, order.firsts, spans_of, losing_of, strict=True):
        cuts = {"row": spans.row_S[own] - first, "begin": spans.begin_S[own], "end": spans.end_S[own]}
        write_parquet(folders.of("cuts", shard), pa.table(cuts))
        write_parquet(folders.of("verdicts", shard), _verdicts(losing_L[losing], int(first), ids, scan, found))


def merge_cuts(scan: ScanInput, found: PieceVerdicts) -> CutSpans:
    """What is cut of documents that stay: pieces that overlap or touch make one span."""
    pieces, documents = scan.pieces, np.arange(len(scan.row_D))
    # Of each piece, its document's number among D.
    document_M = np.repeat(documents, np.diff(pieces.bounds))
    # Pieces that are cut, by (document, begin), and what they cover.
    cut_C = np.flatnonzero(found.cut & (found.verdicts[document_M] == EDITED))
    document_C, begin_C, end_C = document_M[cut_C], pieces.begins[cut_C], pieces.ends[cut_C]
    # Whether a piece begins a span: it is its document's first one, or leaves a gap to the piece before.
    opens_C = np.ones(len(cut_C), np.bool_)
    opens_C[1:] = (document_C[1:] != document_C[:-1]) | (begin_C[1:] > end_C[:-1])
    # Whether it ends one: the next piece begins the next span, or there is none.
    closes_C = np.ones(len(cut_C), np.bool_)
    closes_C[:-1] = opens_C[1:]
    # Spans, so far in keep order of their documents.
    row_S, begin_S, end_S = scan.row_D[document_C[opens_C]], begin_C[opens_C], end_C[closes_C]
    by_row_S = np.lexsort((begin_S, row_S))
    return CutSpans(row_S[by_row_S], begin_S[by_row_S], end_S[by_row_S])


def _verdicts(losing_L: Indices, first: int, ids: pa.Array, scan: ScanInput, found: PieceVerdicts) -> pa.Table:
    """Of documents of one shard, whose first row among all of the corpus is `first`. ids: of all documents, by row."""
    row_L = scan.row_D[losing_L]
    return pa.table(
        {
            "row": row_L - first,
            "id": ids.take(pa.array(row_L)),
            "reason": pa.array(
                [REASONS.get(verdict, "") for verdict in found.verdicts[losing_L].tolist()], pa.string()
            ),
            "characters": scan.length_D[losing_L],
            "cut": found.lost[losing_L],
            "parts": found.spans[losing_L],
            "partner": ids.take(pa.array(scan.row_D[found.partners[losing_L]])),
        }
    )


def _by_shard(row_X: Indices, order: KeepOrder) -> list[slice]:
    """Of rows among all of the corpus, ascending, those of each shard."""
    bounds = [*np.searchsorted(row_X, order.firsts).tolist(), len(row_X)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]
