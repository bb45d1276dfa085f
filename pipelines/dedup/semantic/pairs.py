"""Pairs of similar vectors within the clusters of k-means (SemDeDup, arXiv 2303.09540, section 3).

Vectors and, for the assignment, centroids have length 1, so the nearest centroid by distance is the nearest by cosine:
the assignment is that of spherical k-means. Only pairs within a cluster are compared. The cost is N^2 / clusters, and
duplicates in different clusters are missed.

Shapes: N vectors of D dimensions, E pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.semantic.embedder import Vectors
from moray.pipelines.shared.arrays import Indices

CLUSTER = 2_000  # approximate vectors per cluster, if the number of clusters is not set
_SAMPLE = 100_000  # vectors that k-means is fitted to
_BLOCK = 1_024


def clusters_of(vectors: Vectors, clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """The cluster of each vector, int64 [N]. clusters: their number; 0: enough for about CLUSTER vectors each."""
    count = clusters or -(-len(vectors) // CLUSTER)
    count = min(count, len(vectors))
    if count <= 1:
        return np.zeros(len(vectors), np.int64)
    from sklearn.cluster import MiniBatchKMeans

    generator = np.random.default_rng(seed)
    sample = vectors
    if len(vectors) > _SAMPLE:
        sample = vectors[np.sort(generator.choice(len(vectors), _SAMPLE, replace=False))]
    fitted = MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096).fit(sample)
    centroids = fitted.cluster_centers_ / np.maximum(np.linalg.norm(fitted.cluster_centers_, axis=1)[:, None], 1e-12)
    blocks = [np.argmax(vectors[at : at + _BLOCK] @ centroids.T, axis=1) for at in range(0, len(vectors), _BLOCK)]
    labels: npt.NDArray[np.int64] = np.concatenate(blocks).astype(np.int64)
    return labels


def similar_pairs(vectors: Vectors, labels: Indices, min_cosine: float) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Pairs [E, 2] within a cluster with a cosine of at least `min_cosine`, ascending in a pair; and cosines [E]."""
    pairs, scores = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        own = vectors[members]
        for at in range(0, len(members), _BLOCK):
            cosines = own[at : at + _BLOCK] @ own[at:].T
            one, other = np.nonzero(np.triu(cosines >= min_cosine, k=1))
            pairs.append(np.stack((members[at + one], members[at + other]), axis=1))
            scores.append(cosines[one, other].astype(np.float64))
    return np.concatenate(pairs), np.concatenate(scores)
