"""Which vectors are alike: all pairs within the clusters that k-means makes (SemDeDup, arXiv 2303.09540, section 3).

Vectors have length 1, so the nearest centre by distance is the nearest by cosine, and k-means is spherical as far as
the assignment goes; centres are scaled to length 1 for it. Pairs across clusters are not looked at: that is what makes
the cost N^2 / clusters, and what a duplicate at a border may escape by.

Shapes: N vectors of D dimensions, E pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.semantic.embedder import Vectors
from moray.pipelines.shared.arrays import Indices

CLUSTER = 2_000  # vectors of a cluster, about, where the number of clusters is not given
_SAMPLE = 100_000  # vectors that centres are learned from
_BLOCK = 1_024


def clusters_of(vectors: Vectors, clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """int64 [N]: the cluster of each vector. clusters: how many; 0: as many as make CLUSTER vectors each."""
    count = clusters or -(-len(vectors) // CLUSTER)
    count = min(count, len(vectors))
    if count <= 1:
        return np.zeros(len(vectors), np.int64)
    from sklearn.cluster import MiniBatchKMeans

    generator = np.random.default_rng(seed)
    sample = vectors
    if len(vectors) > _SAMPLE:
        sample = vectors[np.sort(generator.choice(len(vectors), _SAMPLE, replace=False))]
    learned = MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096).fit(sample)
    centres = learned.cluster_centers_ / np.maximum(np.linalg.norm(learned.cluster_centers_, axis=1)[:, None], 1e-12)
    blocks = [np.argmax(vectors[at : at + _BLOCK] @ centres.T, axis=1) for at in range(0, len(vectors), _BLOCK)]
    labels: npt.NDArray[np.int64] = np.concatenate(blocks).astype(np.int64)
    return labels


def alike(vectors: Vectors, labels: Indices, least: float) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Pairs [E, 2], ascending within, of one cluster whose cosine is at least `least`; and it [E]."""
    pairs, scores = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        own = vectors[members]
        for at in range(0, len(members), _BLOCK):
            cosines = own[at : at + _BLOCK] @ own[at:].T
            one, other = np.nonzero(np.triu(cosines >= least, k=1))
            pairs.append(np.stack((members[at + one], members[at + other]), axis=1))
            scores.append(cosines[one, other].astype(np.float64))
    return np.concatenate(pairs), np.concatenate(scores)
