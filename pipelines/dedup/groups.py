"""Components of candidate pairs, packed into groups. One task compares one group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.graph import components
from moray.pipelines.shared.arrays import Indices


@dataclass(frozen=True)
class Groups:
    """Candidate documents in groups that are compared independently: both documents of a pair are in one group.

    groups: the group of each document. count: the number of groups. components, largest: the number of components, and
    of documents in the largest one.
    """

    groups: npt.NDArray[np.int32]
    count: int
    components: int
    largest: int

    @staticmethod
    def of(numbers: Indices, pairs: Indices, weights: Indices, max_weight: int) -> Groups:
        """Packs the components of pairs [E, 2] of `numbers`, in order, into groups of about `max_weight`."""
        edges = np.sort(np.searchsorted(numbers, pairs), axis=1)
        labels = components(len(numbers), edges)
        if (labels[edges[:, 0]] != labels[edges[:, 1]]).any():
            raise RuntimeError("a pair of documents is in two components")
        sizes = np.bincount(labels, weights, len(numbers))
        before = np.cumsum(sizes) - sizes  # a component's number is its first document's, so this is in order
        of_label = (before // max_weight).astype(np.int64)
        names, groups = np.unique(of_label[labels], return_inverse=True)
        members = np.bincount(labels, minlength=1)
        return Groups(groups.astype(np.int32), len(names), int((members > 0).sum()), int(members.max()))
