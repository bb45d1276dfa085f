"""Components of candidate pairs, packed into groups: what one task compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.graph import components
from moray.pipelines.shared.arrays import Indices


@dataclass(frozen=True)
class Groups:
    """Documents that are read again, in groups that are compared apart: whoever is in a pair is with its partner.

    groups: of each; count: of groups; components, largest: how many there are, and documents in the largest.
    """

    groups: npt.NDArray[np.int32]
    count: int
    components: int
    largest: int

    @staticmethod
    def of(numbers: Indices, pairs: Indices, weights: Indices, most: int) -> Groups:
        """Components of pairs (numbers, [E, 2]), packed one after another into groups of about `most` weight."""
        edges = np.sort(np.searchsorted(numbers, pairs), axis=1)
        labels = components(len(numbers), edges)
        if (labels[edges[:, 0]] != labels[edges[:, 1]]).any():
            raise RuntimeError("a pair of documents is in two components")
        sizes = np.bincount(labels, weights, len(numbers))
        before = np.cumsum(sizes) - sizes  # a component's number is its first document's, so this is in order
        of_label = (before // most).astype(np.int64)
        names, groups = np.unique(of_label[labels], return_inverse=True)
        members = np.bincount(labels, minlength=1)
        return Groups(groups.astype(np.int32), len(names), int((members > 0).sum()), int(members.max()))
