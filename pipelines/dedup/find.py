"""Which documents go, given what is known of all of them: exact copies, then verified near duplicates, by component.

Everything is in the order in which documents are kept: an older generation, a source named earlier in `prefer`, the
better quality, the longer text, then content hash and id. So the first of a component is the one that stays, and
nothing depends on the order in which documents, shards or workers come.

Shapes: N documents, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup.graph import Candidates, candidates, components
from moray.pipelines.dedup.keep_order import DocumentColumns
from moray.pipelines.shared.arrays import Indices, Keys, Scores


@dataclass(frozen=True)
class Found:
    """What goes of documents in keep order. labels: of each the one that stays for it, itself where it stays.

    removed: see `docs/formats.md`. alike: how many of the candidate pairs were.
    """

    labels: Indices
    removed: pa.Table
    alike: int

    @property
    def gone(self) -> Indices:
        return np.flatnonzero(self.labels != np.arange(len(self.labels)))

    @property
    def clusters(self) -> int:
        """That have any that goes."""
        return len(np.unique(self.labels[self.gone]))


def near_candidates(documents: DocumentColumns, keys: Keys, shingles: Indices) -> Candidates:
    """Pairs to be verified, of documents in keep order: of exact copies, only the first.

    keys: [N, bands]; shingles: [N], how many each has; none: its keys mean nothing.
    """
    firsts = documents.firsts()
    return candidates(keys, firsts[shingles[firsts] > 0])


def find(
    documents: DocumentColumns, pairs: Indices, scores: Scores, least: float, known: Indices | None = None
) -> Found:
    """What goes of documents in keep order: of `pairs` [E, 2], each as alike as `scores` [E] says, those of at least
    `least` are duplicates, and all `known` ones."""
    count = len(documents.ids)
    _, first, group = np.unique(documents.hashes, return_index=True, return_inverse=True)
    original = first[group]
    copies = np.flatnonzero(original != np.arange(count))
    alike, scores = pairs[scores >= least], scores[scores >= least]
    edges = [
        np.stack((original[copies], copies), axis=1),
        alike,
        np.zeros((0, 2), np.int64) if known is None else known,
    ]
    labels = components(count, np.concatenate(edges))
    gone = np.flatnonzero(labels != np.arange(count))
    partner, similarity = _partners(count, alike, scores)
    partner[copies], similarity[copies] = original[copies], 1.0
    exact = documents.hashes[gone] == documents.hashes[labels[gone]]
    table = pa.table(
        {
            "id": _text(documents.ids[gone]),
            "reason": pa.array(np.where(exact, "exact", "near"), pa.string()),
            "representative": _text(documents.ids[labels[gone]]),
            "partner": _text(documents.ids[partner[gone]]),
            "similarity": pa.array(similarity[gone], pa.float64()),
        }
    )
    return Found(labels, table, len(alike))


def _partners(count: int, pairs: Indices, scores: npt.NDArray[np.float64]) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Of each document the one it is most like, the first of these, and how much; itself and 0 for who has none."""
    partner, best = np.arange(count), np.zeros(count)
    both = np.concatenate((pairs, pairs[:, ::-1]))
    twice = np.concatenate((scores, scores))
    order = np.lexsort((both[:, 1], -twice, both[:, 0]))
    who, at = np.unique(both[order, 0], return_index=True)
    partner[who], best[who] = both[order[at], 1], twice[order[at]]
    return partner, best


def _text(column: npt.NDArray[np.bytes_]) -> pa.Array:
    return pa.array([value.decode() for value in column.tolist()], pa.string())
