"""Pairs of documents that share a band key, and the connected components of pairs; compiled by numba.

Shapes: N documents, M members of a band, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.shared.arrays import Indices, Keys

LARGEST = 64  # documents of one key of which every pair is a candidate


@dataclass(frozen=True)
class Candidates:
    """pairs: [E, 2], each once, ascending. capped: keys that more than LARGEST documents share."""

    pairs: Indices
    capped: int


def candidates(keys: Keys, members: Indices) -> Candidates:
    """Of the documents `members`, in keep order, those that share a key of a band; keys: [N, bands], all in memory."""
    bands = [bucket_pairs(keys[members, band], members) for band in range(keys.shape[1])]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *(band.pairs for band in bands)])
    return Candidates(once(np.sort(pairs, axis=1), len(keys)), sum(band.capped for band in bands))


def once(pairs: Indices, count: int) -> Indices:
    """Each of the pairs [E, 2] of places below `count` once, ascending."""
    return np.stack(np.divmod(np.unique(pairs[:, 0] * count + pairs[:, 1]), max(1, count)), axis=1)


def bucket_pairs(
    keys: Keys, numbers: Indices, old_keys: Keys | None = None, old_numbers: Indices | None = None
) -> Candidates:
    """Which documents of one band share a key; keys [M], in keep order. pairs: of their `numbers`, the kept one first.

    Of a key, the first LARGEST documents are all compared; each further one with the first and with the one before it.
    So their number does not explode, they stay one component if they are alike, and a document's pairs depend on those
    before it only: with `old` ones, which come before all others, none of which are paired, the result is what all of
    them would give together.
    """
    if old_keys is None or old_numbers is None:
        old_keys, old_numbers = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    every = np.concatenate((old_keys, keys))
    shared = buckets(every)
    order = shared[np.lexsort((shared, every[shared]))]
    ascending = every[order]
    bounds = np.concatenate(([0], np.flatnonzero(ascending[1:] != ascending[:-1]) + 1, [len(order)])).astype(np.int64)
    pairs = np.empty((_count_pairs(order, bounds, len(old_keys), LARGEST), 2), np.int64)
    _write_pairs(np.concatenate((old_numbers, numbers)), order, bounds, len(old_keys), LARGEST, pairs)
    return Candidates(pairs, int((np.diff(bounds) > LARGEST).sum()))


def buckets(keys: Keys, more_than: int = 1) -> Indices:
    """Where the keys are that more than so many have; one key after another, of a key in no order.

    Few keys are, and only those need an order: numpy's fastest sort keeps none.
    """
    order = np.argsort(keys)
    ascending = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], ascending[1:] != ascending[:-1]))) if len(keys) else order
    sizes = np.diff(np.concatenate((starts, [len(keys)])))
    return order[np.repeat(sizes > more_than, sizes)]


@numba.njit(nogil=True, cache=True)
def _count_pairs(order: Indices, bounds: Indices, old: int, largest: int) -> int:
    """How many pairs `_write_pairs` writes."""
    count = 0
    for g in range(len(bounds) - 1):
        for i in range(bounds[g], bounds[g + 1]):
            if order[i] >= old:
                before = i - bounds[g]
                count += before if before < largest else 2
    return count


@numba.njit(nogil=True, cache=True)
def _write_pairs(numbers: Indices, order: Indices, bounds: Indices, old: int, largest: int, pairs: Indices) -> None:
    """Of each run order[bounds[g] : bounds[g + 1]], every later member that is not one of the first `old` with those
    before it, or with the first and the last of them where they are many."""
    at = 0
    for g in range(len(bounds) - 1):
        begin = bounds[g]
        for i in range(begin, bounds[g + 1]):
            if order[i] < old:
                continue
            if i - begin < largest:
                for j in range(begin, i):
                    pairs[at, 0], pairs[at, 1] = numbers[order[j]], numbers[order[i]]
                    at += 1
            else:
                pairs[at, 0], pairs[at, 1] = numbers[order[begin]], numbers[order[i]]
                pairs[at + 1, 0], pairs[at + 1, 1] = numbers[order[i - 1]], numbers[order[i]]
                at += 2


def components(count: int, pairs: Indices) -> Indices:
    """int64 [count]: of each document the smallest index of its component."""
    parent = np.arange(count)
    joined = np.empty(len(pairs), np.bool_)
    _unite(parent, pairs, joined)
    _flatten(parent)
    return parent


def forest(pairs: Indices) -> Indices:
    """Those of the pairs of any numbers that connect all that the pairs do, and no more: less than there are numbers.

    So forests of parts of a graph, merged, are a forest of it, whatever the parts.
    """
    numbers, places = np.unique(pairs, return_inverse=True)
    joined = np.empty(len(pairs), np.bool_)
    _unite(np.arange(len(numbers)), np.ascontiguousarray(places.reshape(-1, 2)), joined)
    return pairs[joined]


@numba.njit(nogil=True, cache=True)
def _unite(parent: Indices, pairs: Indices, joined: npt.NDArray[np.bool_]) -> None:
    """Union by the smaller root, path halving. joined: whether a pair's two were apart before it."""
    for e in range(len(pairs)):
        a, b = pairs[e, 0], pairs[e, 1]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        joined[e] = a != b
        if a < b:
            parent[b] = a
        else:
            parent[a] = b


@numba.njit(nogil=True, cache=True)
def _flatten(parent: Indices) -> None:
    """Of each its root: a root is smaller than what it is the root of, so it is final before."""
    for i in range(len(parent)):
        parent[i] = parent[parent[i]]
