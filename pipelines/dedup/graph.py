"""Pairs of documents that share a band key, and the connected components of pairs; compiled by numba.

Shapes: N documents, E pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        for group in _groups(column[order]):
            alike = members[order[group]]
            large = len(alike) > LARGEST
            capped += large
            found.append(_star(alike) if large else _all_pairs(alike))
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return Candidates(pairs, capped)


def _groups(ascending: npt.NDArray[np.uint64]) -> Iterator[slice]:
    """Runs of two or more equal keys."""
    changes = np.flatnonzero(ascending[1:] != ascending[:-1]) + 1
    starts, ends = np.append(0, changes), np.append(changes, len(ascending))
    for begin, end in zip(starts, ends, strict=True):
        if end - begin > 1:
            yield slice(begin, end)


def _all_pairs(alike: Indices) -> Indices:
    first, second = np.triu_indices(len(alike), 1)
    return np.stack((alike[first], alike[second]), axis=1)


def _star(alike: Indices) -> Indices:
    neighbours = np.stack((alike[:-1], alike[1:]), axis=1)
    star = np.stack((np.full(len(alike) - 1, alike[0]), alike[1:]), axis=1)
    return np.concatenate((neighbours, star))


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
