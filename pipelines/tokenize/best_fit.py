"""Packing loops, compiled by numba: best-fit over a tree of free space, and copying of pieces.

Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv 2404.10830), section 3: sequences are looked up by
their free space, so placing a piece takes O(log length), independent of the number of sequences.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@numba.njit(nogil=True, cache=True)
def place_pieces(source, begins, counts, target, starts):  # type: ignore[no-untyped-def]
    """target[starts[i] : starts[i] + counts[i]] = source[begins[i] : begins[i] + counts[i]], for every i."""
    for i in range(len(begins)):
        begin, start = begins[i], starts[i]
        for k in range(counts[i]):
            target[start + k] = source[begin + k]


@numba.njit(nogil=True, cache=True)
def best_fit(lengths: Int64, order: Int64, length: int, bins: Int64, at: Int64) -> Int64:
    """Places pieces in `order`. Writes the sequence of each piece to `bins` and its offset there to `at`.

    Returns the free tokens of each sequence.
    """
    size = 1
    while size <= length:
        size *= 2
    # A binary tree: some[size + f] is whether a sequence has f free tokens; inner nodes are the OR of their children.
    some = np.zeros(2 * size, np.bool_)
    newest = np.full(length + 1, -1, np.int64)  # by free tokens: the sequence that reached them last
    before = np.empty(len(order), np.int64)  # linked list: the previous sequence with the same free tokens
    free = np.empty(len(order), np.int64)
    count = 0
    for piece in order:
        least = _least_free(some, size, lengths[piece])
        if least < 0:
            chosen, least = count, length
            count += 1
        else:
            chosen = newest[least]
            newest[least] = before[chosen]
            if newest[least] < 0:
                _clear(some, size + least)
        bins[piece], at[piece] = chosen, length - least
        left = least - lengths[piece]
        free[chosen] = left
        if left:
            before[chosen] = newest[left]
            newest[left] = chosen
            _set(some, size + left)
    return free[:count]


@numba.njit(nogil=True, cache=True, inline="always")
def _least_free(some: Flags, size: int, need: int) -> int:
    """The smallest number of free tokens of a sequence that is at least `need`; -1 if there is none."""
    node = size + need
    if some[node]:
        return need
    while node > 1 and (node & 1 or not some[node + 1]):
        node >>= 1
    if node <= 1:
        return -1
    node += 1
    while node < size:
        node *= 2
        if not some[node]:
            node += 1
    return node - size


@numba.njit(nogil=True, cache=True, inline="always")
def _set(some: Flags, node: int) -> None:
    while node and not some[node]:
        some[node] = True
        node >>= 1


@numba.njit(nogil=True, cache=True, inline="always")
def _clear(some: Flags, node: int) -> None:
    some[node] = False
    while node > 1 and not some[node ^ 1]:
        node >>= 1
        some[node] = False
