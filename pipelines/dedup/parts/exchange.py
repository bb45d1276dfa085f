"""Rows on their way between tasks: each file is Arrow's own format, one batch for each task that will read it.

So a task reads its part of every file as mapped memory, and rows of keys, never text, are what is exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.shared.arrays import Indices, Keys

Columns = dict[str, npt.NDArray[Any]]
_RANGE_ROWS = 2_000_000  # of a range, about


def exchange_ranges(rows: float) -> int:
    """How many ranges of keys, a power of two, for about so many rows."""
    return 1 << max(0, int(rows) // _RANGE_ROWS).bit_length()


def range_of(keys: Keys, ranges: int) -> Indices:
    """By the lower bits: the least of many keys have upper bits that are alike."""
    return (keys & np.uint64(ranges - 1)).astype(np.int64)


def write_parts(path: Path, columns: Mapping[str, npt.NDArray[Any]], parts: Indices, count: int) -> None:
    """Writes rows, of which each goes to one of `count` parts, in their order; the file is whole or not there."""
    order = np.argsort(parts, kind="stable")
    bounds = np.searchsorted(parts[order], np.arange(count + 1))
    table = pa.table({name: column[order] for name, column in columns.items()}).combine_chunks()
    path.parent.mkdir(parents=True, exist_ok=True)
    coming = path.with_name(f".{path.name}")
    with pa.ipc.new_file(coming, table.schema) as writer:
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            batches = table.slice(begin, end - begin).to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema))
    os.replace(coming, path)


def read_part(path: Path, part: int) -> Columns:
    """The rows that go to one part."""
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(part)
        return {name: batch[name].to_numpy().copy() for name in batch.schema.names}


def read_parts(paths: Sequence[Path], part: int) -> Columns:
    """The rows of all files that go to one part, and as `file` the place of each one's file."""
    found = [read_part(path, part) for path in paths]
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
