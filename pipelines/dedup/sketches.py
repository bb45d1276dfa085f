"""Sketches: the output of the signing phase for each shard, as memory-mapped arrays.

    NAME.documents.npy   DOCUMENT [N]              identity, and the columns that decide which of two is kept
    NAME.values.npy      uint64 [bands + 1, N]     the keys of each band, and the first 64 bits of hashes, ascending
    NAME.rows.npy        uint32 [bands + 1, N]     the row of the document of each value
    NAME.bounds.npy      int64 [bands + 1, R + 2]  where each range of values begins, where the last one ends, and N

Values are sorted, so each range of values is contiguous in every file, and one task handles one range of all files. It
reads only that range. With 16 bands, sketches take about 290 bytes per document.

Shapes: N documents of a shard; R ranges of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.dedup_index import halves
from moray.pipelines.dedup.priority_order import DocumentColumns
from moray.pipelines.shared.arrays import Indices, Keys, array_part, mapped, save_array
from moray.pipelines.text.shingles import KEY_BITS
from moray.platform.store.paths import AnyPath, in_threads

DOCUMENT = np.dtype([("id", "S32"), ("hash", "S32"), ("source", "<i8"), ("quality", "<f8"), ("length", "<i8")])
HASH_BITS = 64
_NO_KEY = np.uint64((1 << 64) - 1)  # of a document without words; outside all ranges of keys

Rows = npt.NDArray[np.void]


def rows_of(documents: DocumentColumns) -> Rows:
    """Converts columns to rows of DOCUMENT."""
    rows = np.empty(len(documents.ids), DOCUMENT)
    columns = documents.ids, documents.hashes, documents.sources, documents.qualities, documents.lengths
    for name, column in zip(DOCUMENT.names or (), columns, strict=True):
        rows[name] = column
    return rows


def columns_of(rows: Rows) -> DocumentColumns:
    return DocumentColumns(rows["id"], rows["hash"], rows["source"], rows["quality"], rows["length"])


def has_sketches(folder: AnyPath, name: str) -> bool:
    return _path(folder, name, "documents").exists()


def write_sketches(
    folder: AnyPath, name: str, documents: DocumentColumns, keys: Keys, has_keys: npt.NDArray[np.bool_], ranges: int
) -> None:
    """Writes the files of one shard. keys: [N, bands]. has_keys: [N], false for documents without words."""
    high, _ = halves(documents.hashes)
    values = np.concatenate((np.where(has_keys, keys.T, _NO_KEY), high[None]))
    rows = np.argsort(values, axis=1, kind="stable")
    values = np.take_along_axis(values, rows, 1)
    save_array(_path(folder, name, "values"), values)
    save_array(_path(folder, name, "bounds"), _bounds(values, ranges))
    save_array(_path(folder, name, "rows"), rows.astype(np.uint32))
    save_array(_path(folder, name, "documents"), rows_of(documents))  # written last: marks the shard as done


def _bounds(values: Keys, ranges: int) -> Indices:
    """The contents of NAME.bounds.npy. values: [bands + 1, N], ascending in each row."""
    bounds = np.full((len(values), ranges + 2), values.shape[1], np.int64)
    for band, row in enumerate(values):
        width = (1 << (HASH_BITS if band == len(values) - 1 else KEY_BITS)) // ranges
        lasts = np.array([(part + 1) * width - 1 for part in range(ranges)], np.uint64)
        bounds[band, 0], bounds[band, 1:-1] = 0, np.searchsorted(row, lasts, side="right")
    return bounds


def _path(folder: AnyPath, name: str, kind: str) -> AnyPath:
    return folder / f"{name}.{kind}.npy"


@dataclass(frozen=True)
class Sketches:
    """Sketches of all shards.

    names: stems of the shards' files. firsts: the number of each shard's first document. ranges: the number of ranges
    of values, a power of two.
    """

    folder: AnyPath
    names: tuple[str, ...]
    firsts: tuple[int, ...]
    ranges: int

    def hashes(self, part: int) -> tuple[Keys, Indices]:
        """The first 64 bits of the content hashes in one range, and the numbers of their documents."""
        return self._within(-1, part)

    def keys(self, band: int, part: int) -> tuple[Keys, Indices]:
        """The keys of a band in one range, and the numbers of their documents."""
        return self._within(band, part)

    def documents(self, numbers: Indices) -> Rows:
        """The rows of DOCUMENT of the documents with these numbers."""
        found = np.empty(len(numbers), DOCUMENT)
        for places, rows, documents in self._files(numbers):
            found[places] = documents[rows]
        return found

    def lengths(self, numbers: Indices) -> Indices:
        """The lengths of the documents with these numbers, in characters."""
        found = np.empty(len(numbers), np.int64)
        for places, rows, documents in self._files(numbers):
            found[places] = documents["length"][rows]
        return found

    def _files(self, numbers: Indices) -> Iterator[tuple[Indices, Indices, Rows]]:
        """For each shard with any of `numbers`: their places in `numbers`, their rows, and the shard's documents."""
        files = np.searchsorted(self.firsts, numbers, side="right") - 1
        order = np.argsort(files, kind="stable")
        bounds = np.searchsorted(files[order], np.arange(len(self.names) + 1))
        for file, (begin, end) in enumerate(pairwise(bounds.tolist())):
            if end > begin:
                places = order[begin:end]
                yield places, numbers[places] - self.firsts[file], self._of(self.names[file], "documents")

    def _of(self, name: str, kind: str) -> npt.NDArray[Any]:
        if (name, kind) not in self._mapped:
            self._mapped[name, kind] = mapped(_path(self.folder, name, kind))
        return self._mapped[name, kind]

    @cached_property
    def _mapped(self) -> dict[tuple[str, str], npt.NDArray[Any]]:
        """Arrays that are already mapped: the tasks of all bands read the same files."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _within(self, band: int, part: int) -> tuple[Keys, Indices]:
        """The values of a row of NAME.values.npy in one range, and the numbers of their documents."""
        one = partial(self._of_shard, band, part)
        places = list(zip(self.names, self.firsts, strict=True))
        found = list(map(one, places)) if isinstance(self.folder, Path) else in_threads(one, places)
        values, numbers = zip(*found, strict=True) if found else ((), ())
        return np.concatenate([np.zeros(0, np.uint64), *values]), np.concatenate([np.zeros(0, np.int64), *numbers])

    def _of_shard(self, band: int, part: int, place: tuple[str, int]) -> tuple[Keys, Indices]:
        name, first = place
        bounds = self._of(name, "bounds")[band]
        own = slice(int(bounds[part]), int(bounds[part + 1]))
        if isinstance(self.folder, Path):
            values, rows = (self._of(name, kind)[band, own] for kind in ("values", "rows"))
        else:
            shape = (len(self._of(name, "bounds")), int(bounds[-1]))
            row = band % shape[0]
            values = array_part(_path(self.folder, name, "values"), np.uint64, shape, row, own)
            rows = array_part(_path(self.folder, name, "rows"), np.uint32, shape, row, own)
        return values, rows.astype(np.int64) + first
