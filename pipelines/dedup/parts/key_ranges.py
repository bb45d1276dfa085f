"""Rows between the tasks of dedup-parts: by ranges of their keys, in grouped files, and those whose keys repeat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.shared.arrays import Indices, Keys
from moray.pipelines.shared.grouped_file import read_columns, write_groups

Columns = dict[str, npt.NDArray[Any]]
_RANGE_ROWS = 2_000_000  # of a range, about


def exchange_ranges(rows: float) -> int:
    """How many ranges of keys, a power of two, for about so many rows."""
    return 1 << max(0, int(rows) // _RANGE_ROWS).bit_length()


def range_of(keys: Keys, ranges: int) -> Indices:
    """By the lower bits: the least of many keys have upper bits that are alike."""
    return (keys & np.uint64(ranges - 1)).astype(np.int64)


def write_parts(path: Path, columns: Columns, parts: Indices) -> None:
    """Writes rows, each of which goes to one part, in their order."""
    write_groups(path, pa.table(columns), parts)


def read_parts(paths: Sequence[Path], part: int) -> Columns:
    """The rows of all files that go to one part, and as `file` the place of each one's file."""
    found = [read_columns(path, part) for path in paths]
    sizes = [len(next(iter(columns.values()))) for columns in found]
    joined: Columns = {name: np.concatenate([columns[name] for columns in found]) for name in found[0]}
    return {**joined, "file": np.repeat(np.arange(len(paths)), sizes)}


def repeated_keys(keys: Sequence[Keys]) -> tuple[Indices, Indices]:
    """Of rows with keys of one or more columns: those whose keys another row has too, and the number of that key."""
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
    """Whether rows that are equal in the last column are so in the others: then one sort is enough, and faster."""
    same = keys[-1][order[1:]] == keys[-1][order[:-1]]
    return all(bool((column[order[1:]] == column[order[:-1]])[same].all()) for column in keys[:-1])
