"""Pairs of documents that share a band key, and the connected components of pairs; compiled by numba.

Shapes: N documents, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
LARGEST = 64  # documents of one key of which every pair is a candidate


@dataclass(frozen=True)
class Candidates:
    """pairs: [E, 2], the smaller index first, ascending, each once. capped: keys that more than LARGEST share."""

    pairs: Indices
    capped: int


def candidates(keys: npt.NDArray[np.uint64], members: Indices) -> Candidates:
    """Of the documents `members`, those that share a key of a band; keys: [N, bands].

    Of a key that more than LARGEST documents share, only neighbours, and the first with every other, are pairs, in the
    order of `members`: so they stay one component if they are alike, and their number does not explode.
    """
    found, capped = [np.zeros((0, 2), np.int64)], 0
    for band in range(keys.shape[1]):
        column = keys[members, band]
        order = np.argsort(column, kind="stable")
        ascending = column[order]
        bounds = np.concatenate(([0], np.flatnonzero(ascending[1:] != ascending[:-1]) + 1, [len(members)]))
        sizes = np.diff(bounds)
        count = np.where(sizes > LARGEST, 2 * (sizes - 1), sizes * (sizes - 1) // 2).sum()
        pairs = np.empty((count, 2), np.int64)
        _write_pairs(members[order], bounds, LARGEST, pairs)
        found.append(pairs)
        capped += int((sizes > LARGEST).sum())
    return Candidates(np.unique(np.sort(np.concatenate(found), axis=1), axis=0), capped)


@numba.njit(nogil=True, cache=True)
def _write_pairs(members: Indices, bounds: Indices, largest: int, pairs: Indices) -> None:
    """Of each run members[bounds[g] : bounds[g + 1]], all pairs, or a chain and a star where it is too long."""
    at = 0
    for g in range(len(bounds) - 1):
        begin, end = bounds[g], bounds[g + 1]
        for i in range(begin, end):
            for j in range(i + 1, end):
                if end - begin <= largest or i == begin:
                    pairs[at, 0], pairs[at, 1] = members[i], members[j]
                    at += 1
                if end - begin > largest and j == i + 1:
                    pairs[at, 0], pairs[at, 1] = members[i], members[j]
                    at += 1
                    if i > begin:
                        break


@numba.njit(nogil=True, cache=True)
def components(count: int, pairs: Indices) -> Indices:
    """int64 [count]: of each document the smallest index of its component. Union by the smaller root, path halving."""
    parent = np.arange(count)
    for e in range(len(pairs)):
        a, b = pairs[e, 0], pairs[e, 1]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        else:
            parent[a] = b
    for i in range(count):  # a root is smaller than what it is the root of, so it is final before
        parent[i] = parent[parent[i]]
    return parent
