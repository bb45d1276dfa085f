"""The output of the scan of repeated pieces: two files per shard, from which a task rewrites the shard.

`cuts` lists the spans to cut from kept documents: row in the shard, begin, end. `decisions` lists every document that
loses text, with the reason if it is removed.

Shapes: M repeated pieces in D documents; C of the pieces are cut, in S spans; L documents lose text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moray.pipelines.dedup.parts.scan import EDITED, REASONS, ScanDecisions
from moray.pipelines.dedup.parts.scan_input import ScanInput
from moray.pipelines.dedup.parts.tasks import Folders
from moray.pipelines.dedup.priority_order import PriorityOrder
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.shards import Row


class CutSpans(NamedTuple):
    """Spans of characters to cut, sorted by (row, begin). A row is the index of a document in the corpus."""

    row_S: Indices
    begin_S: Indices
    end_S: Indices


def write_scan_output(
    shards: Sequence[Row], folders: Folders, order: PriorityOrder, scan: ScanInput, found: ScanDecisions
) -> None:
    """Writes `cuts` and `decisions` of each shard, sorted by row."""
    spans = merge_cuts(scan, found)
    # The documents that lose text, as places among D, sorted by row.
    losing_L = np.flatnonzero(found.decisions > 0)
    losing_L = losing_L[np.argsort(scan.row_D[losing_L])]
    ids = order.table["id"].combine_chunks()
    spans_of, losing_of = _by_shard(spans.row_S, order), _by_shard(scan.row_D[losing_L], order)
    for shard, first, own, losing in zip(shards, order.firsts, spans_of, losing_of, strict=True):
        cuts = {"row": spans.row_S[own] - first, "begin": spans.begin_S[own], "end": spans.end_S[own]}
        write_parquet(folders.of("cuts", shard), pa.table(cuts))
        write_parquet(folders.of("decisions", shard), _decisions(losing_L[losing], int(first), ids, scan, found))


def merge_cuts(scan: ScanInput, found: ScanDecisions) -> CutSpans:
    """The spans to cut from kept documents. Overlapping and adjacent pieces become one span."""
    pieces, documents = scan.pieces, np.arange(len(scan.row_D))
    # The document of each piece, as a place among D.
    document_M = np.repeat(documents, np.diff(pieces.bounds))
    # The pieces to cut, by (document, begin), and their bounds.
    cut_C = np.flatnonzero(found.cut & (found.decisions[document_M] == EDITED))
    document_C, begin_C, end_C = document_M[cut_C], pieces.begins[cut_C], pieces.ends[cut_C]
    # Whether a piece begins a span: it is the first of its document, or there is a gap between it and the previous one.
    opens_C = np.ones(len(cut_C), np.bool_)
    opens_C[1:] = (document_C[1:] != document_C[:-1]) | (begin_C[1:] > end_C[:-1])
    # Whether a piece ends a span: the next piece begins a span, or there is no next piece.
    closes_C = np.ones(len(cut_C), np.bool_)
    closes_C[:-1] = opens_C[1:]
    # Spans, in priority order of their documents until they are sorted by row.
    row_S, begin_S, end_S = scan.row_D[document_C[opens_C]], begin_C[opens_C], end_C[closes_C]
    by_row_S = np.lexsort((begin_S, row_S))
    return CutSpans(row_S[by_row_S], begin_S[by_row_S], end_S[by_row_S])


def _decisions(losing_L: Indices, first: int, ids: pa.Array, scan: ScanInput, found: ScanDecisions) -> pa.Table:
    """The table `decisions` of one shard. first: the corpus row of its first document. ids: [N], of all documents."""
    row_L = scan.row_D[losing_L]
    return pa.table(
        {
            "row": row_L - first,
            "id": ids.take(pa.array(row_L)),
            "reason": pa.array(
                [REASONS.get(decision, "") for decision in found.decisions[losing_L].tolist()], pa.string()
            ),
            "characters": scan.length_D[losing_L],
            "cut": found.lost[losing_L],
            "parts": found.spans[losing_L],
            "partner": ids.take(pa.array(scan.row_D[found.partners[losing_L]])),
        }
    )


def _by_shard(row_X: Indices, order: PriorityOrder) -> list[slice]:
    """The slice of each shard in ascending rows of the corpus."""
    bounds = [*np.searchsorted(row_X, order.firsts).tolist(), len(row_X)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]
