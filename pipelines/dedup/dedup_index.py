"""The dedup index: band keys and content hashes of documents, against which later runs deduplicate.

An index is a chain of generations, one per run with its name. Each is part of that run's artifact and never changes:

    index/index.json                     the documents artifact, and the number of its first document
    index/band-BB/range-RRRRR.parquet    key, document: ascending by key, documents of one key in priority order
    index/hashes/range-RRRRR.parquet     96 bits of the hash of each text, document
    index/representatives.parquet        document, representative: of the removed documents among the above

Documents are numbered consecutively in the order of their shards and generations, so a number locates the text with
which a new document is compared. Exact copies and texts without words have no keys in the index. Sorted numbers are
delta-encoded: for any number of documents, a key of 48 bits and its document take 53 bits, and a hash takes 101, so
16 bands need 118 bytes per document.

Shapes: N documents, M lookup keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moray.pipelines.shared.arrays import Indices, Keys
from moray.pipelines.text.shingles import KEY_BITS
from moray.platform.core.atomic import write_json
from moray.platform.store.paths import AnyPath, local_file, new_file

FOLDER = "index"
_RANGE_ENTRIES = 4_000_000  # approximate maximum per file; a lookup holds one file in memory

Hashes = npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class Generation:
    """The documents of one run. documents: their artifact (`step/fingerprint`). offset: the number of the first
    document. shards, rows: files of the artifact, and documents per file. ranges: files per band, a power of two."""

    documents: str
    offset: int
    shards: tuple[str, ...]
    rows: tuple[int, ...]
    ranges: int

    @property
    def count(self) -> int:
        return sum(self.rows)

    def write(self, folder: Path) -> None:
        write_json(folder / FOLDER / "index.json", asdict(self))

    @staticmethod
    def read(folder: AnyPath) -> Generation:
        stored = json.loads((folder / FOLDER / "index.json").read_text())
        return Generation(**stored | {"shards": tuple(stored["shards"]), "rows": tuple(stored["rows"])})


def index_ranges(count: int) -> int:
    """The number of files per band for `count` documents."""
    return 1 << max(0, (count - 1) // _RANGE_ENTRIES).bit_length()


@dataclass(frozen=True)
class Earlier:
    """A generation of an earlier run. folder: the artifact with its index; texts: the artifact of its documents."""

    generation: Generation
    folder: AnyPath
    texts: AnyPath


def write_band(folder: AnyPath, band: int, part: int, keys: Keys, numbers: Indices) -> None:
    """Writes the keys of one range of a band with the numbers of their documents. Order within a key is kept."""
    order = np.argsort(keys, kind="stable")
    _write(_range(_band_folder(folder, band), part), {"key": keys[order], "document": numbers[order]})


def find_earlier_keys(earlier: Sequence[Earlier], band: int, keys: Keys) -> tuple[Keys, Indices]:
    """Keys and numbers of all earlier documents with one of these keys [M]; in priority order within a key."""
    lookups = np.unique(keys)
    found_keys, found_numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for one in earlier:
        for part, table in _read_ranges(_band_folder(one.folder, band), one.generation.ranges, KEY_BITS, lookups):
            stored = table["key"].to_numpy().view(np.uint64)
            rows = np.flatnonzero(np.isin(stored, part, assume_unique=False))
            found_keys.append(stored[rows])
            found_numbers.append(table["document"].to_numpy()[rows])
    return np.concatenate(found_keys), np.concatenate(found_numbers)


def write_hashes(folder: AnyPath, part: int, hashes: Hashes, numbers: Indices) -> None:
    """Writes the distinct hashes of one range and the numbers of their documents."""
    high, low = halves(hashes)
    order = np.lexsort((low, high))
    columns: dict[str, npt.NDArray[Any]] = {"key": high[order], "rest": low[order], "document": numbers[order]}
    _write(_range(folder / FOLDER / "hashes", part), columns)


def find_hashes(earlier: Sequence[Earlier], hashes: Hashes) -> Indices:
    """The number of the earlier document with each of these hashes, int64 [M]; -1 for none."""
    high, low = halves(hashes)
    found = np.full(len(hashes), -1, np.int64)
    order = np.argsort(high, kind="stable")
    for one in earlier:
        for part, table in _read_ranges(one.folder / FOLDER / "hashes", one.generation.ranges, 64, high[order]):
            at = {(h, r): n for h, r, n in zip(*_matching(table, part), strict=True)}
            begin = int(np.searchsorted(high[order], part[0]))
            for i in order[begin : begin + len(part)].tolist():
                found[i] = at.get((int(high[i]), int(low[i])), found[i])
    return found


def _matching(table: pa.Table, part: Keys) -> tuple[list[int], list[int], list[int]]:
    """(key, rest, document) of the rows with one of these keys."""
    stored = table["key"].to_numpy().view(np.uint64)
    rows = np.flatnonzero(np.isin(stored, part))
    rest = table["rest"].to_numpy()[rows].view(np.uint32)
    return stored[rows].tolist(), rest.tolist(), table["document"].to_numpy()[rows].tolist()


def write_representatives(folder: Path, documents: Indices, representatives: Indices) -> None:
    columns = {"document": documents, "representative": representatives}
    _write(folder / FOLDER / "representatives.parquet", columns)


@dataclass(frozen=True)
class Representatives:
    """The representatives of removed documents of earlier runs. documents: ascending."""

    documents: Indices
    representatives: Indices

    @staticmethod
    def read(earlier: Sequence[Earlier]) -> Representatives:
        none = pa.table({"document": np.zeros(0, np.int64), "representative": np.zeros(0, np.int64)})
        tables = [_read(one.folder / FOLDER / "representatives.parquet") for one in earlier]
        table = pa.concat_tables([none, *tables]).sort_by("document")
        return Representatives(table["document"].to_numpy(), table["representative"].to_numpy())

    def has(self, numbers: Indices) -> npt.NDArray[np.bool_]:
        """Whether each of these documents is removed."""
        return np.isin(numbers, self.documents)

    def of(self, numbers: Indices) -> Indices:
        """The representative of each of these documents, which is the document itself if it is kept."""
        found = numbers.copy()
        while (removed := self.has(found)).any():  # a later run may have removed a representative
            found[removed] = self.representatives[np.searchsorted(self.documents, found[removed])]
        return found


def _band_folder(folder: AnyPath, band: int) -> AnyPath:
    return folder / FOLDER / f"band-{band:02d}"


def halves(hashes: Hashes) -> tuple[Keys, npt.NDArray[np.uint32]]:
    """The first 64 and the next 32 bits of hexadecimal hashes."""
    raw = np.frombuffer(bytes.fromhex(b"".join(one[:24] for one in hashes.tolist()).decode()), np.uint8).reshape(-1, 12)
    return (
        np.ascontiguousarray(raw[:, :8]).view(">u8").ravel().astype(np.uint64),
        np.ascontiguousarray(raw[:, 8:]).view(">u4").ravel().astype(np.uint32),
    )


def _range(folder: AnyPath, part: int) -> AnyPath:
    return folder / f"range-{part:05d}.parquet"


def _read_ranges(folder: AnyPath, ranges: int, bits: int, keys: Keys) -> Iterator[tuple[Keys, pa.Table]]:
    """Reads each range that contains any of the ascending `keys`; yields those keys and the file."""
    for part, (begin, end) in enumerate(range_bounds(keys, bits, ranges)):
        if end > begin:
            yield keys[begin:end], _read(_range(folder, part))


def range_bounds(keys: Keys, bits: int, ranges: int) -> list[tuple[int, int]]:
    """[begin, end) of the ascending keys in each range. The ranges divide the values of `bits` bits equally."""
    shift = np.uint64(bits - (ranges.bit_length() - 1))
    if ranges == 1:
        return [(0, len(keys))]
    ends = np.searchsorted(keys >> shift, np.arange(ranges, dtype=np.uint64), side="right").tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _signed(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A signed view: Parquet delta-encodes signed numbers only, and their differences wrap around as unsigned do."""
    return values.view(f"i{values.dtype.itemsize}")


def _read(path: AnyPath) -> pa.Table:
    with local_file(path) as local:
        return pq.read_table(local)


def _write(path: AnyPath, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes a Parquet file atomically."""
    table = pa.table({name: _signed(values) for name, values in columns.items()})
    packed = [name for name in table.column_names if name != "rest"]
    encodings = {name: "DELTA_BINARY_PACKED" if name in packed else "PLAIN" for name in table.column_names}
    with new_file(path) as temporary:
        pq.write_table(
            table,
            temporary,
            use_dictionary=False,
            column_encoding=encodings,
            compression="none",
            write_statistics=False,
        )
