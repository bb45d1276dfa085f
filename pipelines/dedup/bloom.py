"""The Bloom filter form of the index: half the size, but it stores only whether a key was seen, not its document.

There is one filter per band and range (LSHBloom, arXiv 2411.04257). With 25 bits per value and 17 probes, 6 of 10^6
lookups are false positives (0.6185^25, Bloom 1970), so about 100 of 10^6 new documents are removed although they share
no key with an earlier one. The earlier documents cannot be identified, so matches are not verified: a document that
shares a key is removed. 16 bands and the hashes take 53.1 bytes per document.

Files `index/bloom-NAME-RRRRR.npy` are memory-mapped: a probe touches one page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.dedup_index import FOLDER, Earlier, range_bounds
from moray.pipelines.shared.arrays import mapped, save_array
from moray.pipelines.text.utf8 import mixed
from moray.pipelines.text.words import Hashes
from moray.platform.store.paths import AnyPath

BITS, PROBES = 25, 17
_63, _6 = np.uint64(63), np.uint64(6)
_ONE, _OFFSET = np.uint64(1), np.uint64(0x9E3779B97F4A7C15)


def write_bloom(folder: AnyPath, name: str, part: int, values: Hashes) -> None:
    """Writes a filter of these values of one range, atomically."""
    words = np.zeros(max(1, -(-len(values) * BITS // 64)), np.uint64)
    _insert(words, values)
    save_array(_path(folder, name, part), words)


def seen(earlier: Sequence[Earlier], name: str, values: Hashes, bits: int) -> npt.NDArray[np.bool_]:
    """Whether a filter of this name contains each value. bits: the width of the values."""
    order = np.argsort(values)
    ascending, hits = values[order], np.zeros(len(values), np.bool_)
    for one in earlier:
        for part, (begin, end) in enumerate(range_bounds(ascending, bits, one.generation.ranges)):
            if end > begin:
                _lookup(mapped(_path(one.folder, name, part)), ascending[begin:end], hits[begin:end])
    found = np.empty(len(values), np.bool_)
    found[order] = hits
    return found


def _path(folder: AnyPath, name: str, part: int) -> AnyPath:
    return folder / FOLDER / f"bloom-{name}-{part:05d}.npy"


@numba.njit(nogil=True, cache=True, inline="always")
def _bit(value: np.uint64, probe: int, bits: np.uint64) -> np.uint64:
    """The bit of a probe. All probes derive from two hashes (Kirsch and Mitzenmacher 2006)."""
    one = mixed(value)
    return (one + np.uint64(probe) * (mixed(value + _OFFSET) | _ONE)) % bits


@numba.njit(nogil=True, cache=True)
def _insert(words: Hashes, values: Hashes) -> None:
    bits = np.uint64(len(words) * 64)
    for value in values:
        for probe in range(PROBES):
            at = _bit(value, probe, bits)
            words[at >> _6] |= _ONE << (at & _63)


@numba.njit(nogil=True, cache=True)
def _lookup(words: Hashes, values: Hashes, found: npt.NDArray[np.bool_]) -> None:
    bits = np.uint64(len(words) * 64)
    for i in range(len(values)):
        has = True
        for probe in range(PROBES):
            at = _bit(values[i], probe, bits)
            if not (words[at >> _6] >> (at & _63)) & _ONE:
                has = False
                break
        if has:
            found[i] = True
