"""Pairs of documents that share a band key, and their connected components. Compiled by numba.

A bucket is all documents with the same key of a band.

Shapes: N documents, M keys of a band, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.shared.arrays import Indices, Keys

LARGEST = 64  # documents of one bucket of which every pair is a candidate


@dataclass(frozen=True)
class Candidates:
    """pairs: [E, 2], distinct, ascending. capped: the number of buckets of more than LARGEST documents."""

    pairs: Indices
    capped: int


def candidates(keys: Keys, members: Indices) -> Candidates:
    """Pairs of the documents `members`, in priority order, that share a key of any band. keys: [N, bands]."""
    bands = [bucket_pairs(keys[members, band], members) for band in range(keys.shape[1])]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *(band.pairs for band in bands)])
    return Candidates(once(np.sort(pairs, axis=1), len(keys)), sum(band.capped for band in bands))


def once(pairs: Indices, count: int) -> Indices:
    """The distinct pairs of [E, 2] places below `count`, ascending."""
    return np.stack(np.divmod(np.unique(pairs[:, 0] * count + pairs[:, 1]), max(1, count)), axis=1)


def bucket_pairs(
    keys: Keys, numbers: Indices, old_keys: Keys | None = None, old_numbers: Indices | None = None
) -> Candidates:
    """Pairs of documents that share a key of one band. keys: [M], in priority order. pairs: of their `numbers`, the
    document of higher priority first.

    In a bucket, the first LARGEST documents are all paired; each further one is paired with the first and with its
    predecessor. This bounds the number of pairs and keeps similar documents in one component. The pairs of a document
    depend only on documents of higher priority, so earlier runs can be added as `old_keys` and `old_numbers`: these
    precede all others and are not paired with each other, and the result equals that of one run over all documents.
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
    """The places of all keys in buckets of more than `more_than`, bucket after bucket, unordered within a bucket.

    numpy's fastest sort is not stable; the few places that are returned are cheap to order afterwards.
    """
    order = np.argsort(keys)
    ascending = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], ascending[1:] != ascending[:-1]))) if len(keys) else order
    sizes = np.diff(np.concatenate((starts, [len(keys)])))
    return order[np.repeat(sizes > more_than, sizes)]


@numba.njit(nogil=True, cache=True)
def _count_pairs(order: Indices, bounds: Indices, old: int, largest: int) -> int:
    """The number of pairs that `_write_pairs` writes."""
    count = 0
    for g in range(len(bounds) - 1):
        for i in range(bounds[g], bounds[g + 1]):
            if order[i] >= old:
                before = i - bounds[g]
                count += before if before < largest else 2
    return count


@numba.njit(nogil=True, cache=True)
def _write_pairs(numbers: Indices, order: Indices, bounds: Indices, old: int, largest: int, pairs: Indices) -> None:
    """Writes the pairs of each bucket order[bounds[g] : bounds[g + 1]].

    Pairs each member that is not among the first `old` keys with its predecessors in the bucket, or, from the
    `largest`-th member on, with the first and the last of them.
    """
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
    """The component of each document, as the smallest index in it, int64 [count]."""
    parent = np.arange(count)
    joined = np.empty(len(pairs), np.bool_)
    _unite(parent, pairs, joined)
    _flatten(parent)
    return parent


def forest(pairs: Indices) -> Indices:
    """A spanning forest of the pairs, which may hold any numbers: a subset with the same connected components.

    It has fewer edges than there are distinct numbers. A forest of merged forests of the parts of a graph is a forest
    of the graph, for any partition.
    """
    numbers, places = np.unique(pairs, return_inverse=True)
    joined = np.empty(len(pairs), np.bool_)
    _unite(np.arange(len(numbers)), np.ascontiguousarray(places.reshape(-1, 2)), joined)
    return pairs[joined]


@numba.njit(nogil=True, cache=True)
def _unite(parent: Indices, pairs: Indices, joined: npt.NDArray[np.bool_]) -> None:
    """Union-find with path halving; the smaller root wins. joined: whether a pair connected two components."""
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
    """Replaces each parent by its root. A root is smaller than its members, so it is final when they are reached."""
    for i in range(len(parent)):
        parent[i] = parent[parent[i]]
