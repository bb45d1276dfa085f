"""The exchange of rows between the tasks of dedup-parts: files grouped by range of keys, and the search for repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.shared.arrays import Indices, Keys
from moray.pipelines.shared.grouped_file import read_columns, write_groups
from moray.platform.store.paths import AnyPath, in_threads

Columns = dict[str, npt.NDArray[Any]]
_RANGE_ROWS = 2_000_000  # approximate rows per range


def exchange_ranges(rows: float) -> int:
    """The number of ranges of keys, a power of two, for about `rows` rows."""
    return 1 << max(0, int(rows) // _RANGE_ROWS).bit_length()


def range_of(keys: Keys, ranges: int) -> Indices:
    """The range of each key, from its lower bits: winnowing selects minima, so the upper bits are not uniform."""
    return (keys & np.uint64(ranges - 1)).astype(np.int64)


def write_parts(path: AnyPath, columns: Columns, parts: Indices) -> None:
    """Writes rows grouped by part, in their order. parts: the part of each row."""
    write_groups(path, pa.table(columns), parts)


def read_parts(paths: Sequence[AnyPath], part: int) -> Columns:
    """The rows of one part from all files; the column `file` is the index of each row's file in `paths`."""
    found = in_threads(lambda path: read_columns(path, part), paths)
    sizes = [len(next(iter(columns.values()))) for columns in found]
    joined: Columns = {name: np.concatenate([columns[name] for columns in found]) for name in found[0]}
    return {**joined, "file": np.repeat(np.arange(len(paths)), sizes)}


def repeated_keys(keys: Sequence[Keys]) -> tuple[Indices, Indices]:
    """The rows whose key, of one or more columns, occurs more than once, and a group number for each distinct key."""
    order = np.argsort(keys[-1])
    if not _in_runs(keys, order):
        order = np.lexsort(keys)
    ascending = [column[order] for column in keys]
    differs = np.zeros(max(0, len(order) - 1), np.bool_)
    for column in ascending:
        differs |= column[1:] != column[:-1]
    first = np.concatenate((np.ones(min(1, len(order)), np.bool_), differs))
    group = np.cumsum(first) - 1
    many = np.bincount(group, minlength=1)[group] > 1 if len(group) else first
    names = np.cumsum(first & many) - 1
    return order[many], names[many].astype(np.int64)


def _in_runs(keys: Sequence[Keys], order: Indices) -> bool:
    """Whether rows with equal last columns are equal in all columns. Then one sort suffices."""
    same = keys[-1][order[1:]] == keys[-1][order[:-1]]
    return all(bool((column[order[1:]] == column[order[:-1]])[same].all()) for column in keys[:-1])
