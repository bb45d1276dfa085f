"""The decision which documents are removed: exact copies and verified near duplicates, by connected component.

All arrays are in priority order (priority_order.py): an older generation, a source named earlier in `prefer`, the
higher quality, the longer text, then content hash and id. The first document of a component is kept, so the result does
not depend on the order of documents, shards or workers.

Shapes: N documents, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup.graph import Candidates, candidates, components
from moray.pipelines.dedup.priority_order import DocumentColumns
from moray.pipelines.shared.arrays import Indices, Keys, Scores


@dataclass(frozen=True)
class Found:
    """Duplicates among documents in priority order.

    labels: [N], the representative of each document, which is the document itself if it is kept. removed: the removed
    documents, see `docs/formats.md`. similar: the number of candidate pairs that are duplicates.
    """

    labels: Indices
    removed: pa.Table
    similar: int

    @property
    def clusters(self) -> int:
        """The number of clusters with at least one removed document."""
        return len(np.unique(self.labels[self.labels != np.arange(len(self.labels))]))


def near_candidates(documents: DocumentColumns, keys: Keys, shingles: Indices) -> Candidates:
    """Candidate pairs to verify, for documents in priority order. Of exact copies, only the first is a candidate.

    keys: [N, bands], band keys. shingles: [N], shingles per document; a document without shingles has no valid keys.
    """
    firsts = documents.firsts()
    return candidates(keys, firsts[shingles[firsts] > 0])


def find(
    documents: DocumentColumns, pairs: Indices, scores: Scores, min_similarity: float, known: Indices | None = None
) -> Found:
    """Finds the duplicates among documents in priority order.

    Of the candidate `pairs` [E, 2], those with `scores` [E] of at least `min_similarity` are duplicates. `known` pairs
    are duplicates by an earlier decision.
    """
    count = len(documents.ids)
    _, first, group = np.unique(documents.hashes, return_index=True, return_inverse=True)
    original = first[group]
    copies = np.flatnonzero(original != np.arange(count))
    similar, scores = pairs[scores >= min_similarity], scores[scores >= min_similarity]
    edges = [
        np.stack((original[copies], copies), axis=1),
        similar,
        np.zeros((0, 2), np.int64) if known is None else known,
    ]
    labels = components(count, np.concatenate(edges))
    removed = np.flatnonzero(labels != np.arange(count))
    partner, similarity = _partners(count, similar, scores)
    partner[copies], similarity[copies] = original[copies], 1.0
    exact = documents.hashes[removed] == documents.hashes[labels[removed]]
    table = pa.table(
        {
            "id": _text(documents.ids[removed]),
            "reason": pa.array(np.where(exact, "exact", "near"), pa.string()),
            "representative": _text(documents.ids[labels[removed]]),
            "partner": _text(documents.ids[partner[removed]]),
            "similarity": pa.array(similarity[removed], pa.float64()),
        }
    )
    return Found(labels, table, len(similar))


def _partners(count: int, pairs: Indices, scores: npt.NDArray[np.float64]) -> tuple[Indices, npt.NDArray[np.float64]]:
    """The most similar document of each document, and their similarity; itself and 0 without a pair.

    Of equally similar documents, the first in priority order is chosen.
    """
    partner, best = np.arange(count), np.zeros(count)
    both = np.concatenate((pairs, pairs[:, ::-1]))
    twice = np.concatenate((scores, scores))
    order = np.lexsort((both[:, 1], -twice, both[:, 0]))
    paired, at = np.unique(both[order, 0], return_index=True)
    partner[paired], best[paired] = both[order[at], 1], twice[order[at]]
    return partner, best


def _text(column: npt.NDArray[np.bytes_]) -> pa.Array:
    return pa.array([value.decode() for value in column.tolist()], pa.string())
