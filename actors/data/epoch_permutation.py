"""A pseudo-random permutation of range(n) that is computed, not stored: constant time and memory per element.

A Feistel network is a permutation of all numbers of a given bit length, for any round function. Numbers outside
[0, n) are passed through it again until they are inside (Black & Rogaway 2002, "cycle walking"). This takes fewer than
two passes on average.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
U64 = npt.NDArray[np.uint64]


def permuted(places: npt.NDArray[np.int64], n: int, key: str) -> npt.NDArray[np.int64]:
    """The elements at `places`, each in [0, n), of the permutation of range(n) that `key` selects."""
    bits = max(1, (n - 1).bit_length())
    x = places.astype(np.uint64)
    outside = np.ones(len(x), np.bool_)
    while outside.any():
        x[outside] = _network(x[outside], bits, key)
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def _network(x: U64, bits: int, key: str) -> U64:
    """A permutation of [0, 2^bits). Rounds change the two halves alternately; they differ in size if `bits` is odd."""
    low = bits // 2
    left, right = x >> np.uint64(low), x & np.uint64((1 << low) - 1)
    left_mask, right_mask = np.uint64((1 << (bits - low)) - 1), np.uint64((1 << low) - 1)
    for number, round_key in enumerate(_round_keys(key)):
        if number % 2:
            left = left ^ (_mixed(right ^ round_key) & left_mask)
        else:
            right = right ^ (_mixed(left ^ round_key) & right_mask)
    return (left << np.uint64(low)) | right


def _mixed(x: U64) -> U64:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1024)
def _round_keys(key: str) -> tuple[np.uint64, ...]:
    digest = hashlib.sha512(key.encode()).digest()
    return tuple(np.uint64(int.from_bytes(digest[8 * i : 8 * i + 8], "little")) for i in range(_ROUNDS))
