"""What dedup keeps of documents for those that come later: their keys by band and range, and their hashes.

An index is a chain of generations, one per run that was given its name, each in that run's artifact and never changed:

    index/index.json                     what follows belongs to, and the number of its first document
    index/band-BB/range-RRRRR.parquet    key, document: ascending by key, documents of one key in keep order
    index/hashes/range-RRRRR.parquet     96 bits of the hash of each text, document
    index/representatives.parquet        document, representative: of those above that did not stay

Documents are numbered in the order of their shards, generation after generation, so a number is a place in a file,
where the text is that a new document is verified against. Exact copies and texts without words have no keys here.
Sorted numbers are stored as packed differences: of n documents, a key of 48 bits and its document take 53 bits whatever
n is, a hash 101, so 16 bands need 118 bytes a document.

Shapes: N documents, M keys that are looked up.
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
from moray.platform.core.atomic import whole_file, write_json

FOLDER = "index"
_RANGE_ENTRIES = 4_000_000  # of a file, at most about: what a lookup holds in memory

Hashes = npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class Generation:
    """The documents of one run. offset: the number of the first one; shards, rows: their files, and documents in each;
    ranges: files of a band, a power of two. documents: the artifact (`step/fingerprint`) that the files are in."""

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
    def read(folder: Path) -> Generation:
        stored = json.loads((folder / FOLDER / "index.json").read_text())
        return Generation(**stored | {"shards": tuple(stored["shards"]), "rows": tuple(stored["rows"])})


def index_ranges(count: int) -> int:
    """Files per band for so many documents."""
    return 1 << max(0, (count - 1) // _RANGE_ENTRIES).bit_length()


@dataclass(frozen=True)
class Earlier:
    """A generation of earlier runs: where its index is, and its documents."""

    generation: Generation
    folder: Path
    texts: Path


def write_band(folder: Path, band: int, part: int, keys: Keys, numbers: Indices) -> None:
    """The keys of one range of a band, those of documents that share one in keep order, and whose they are."""
    order = np.argsort(keys, kind="stable")
    _write(_range(_band_folder(folder, band), part), {"key": keys[order], "document": numbers[order]})


def find_earlier_keys(earlier: Sequence[Earlier], band: int, keys: Keys) -> tuple[Keys, Indices]:
    """Of every earlier document that has one of these keys [M]: the key and its number, in keep order by key."""
    wanted = np.unique(keys)
    found_keys, found_numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for one in earlier:
        for part, table in _read_ranges(_band_folder(one.folder, band), one.generation.ranges, KEY_BITS, wanted):
            stored = table["key"].to_numpy().view(np.uint64)
            here = np.flatnonzero(np.isin(stored, part, assume_unique=False))
            found_keys.append(stored[here])
            found_numbers.append(table["document"].to_numpy()[here])
    return np.concatenate(found_keys), np.concatenate(found_numbers)


def write_hashes(folder: Path, part: int, hashes: Hashes, numbers: Indices) -> None:
    """Distinct hashes of one range, and who has them."""
    high, low = halves(hashes)
    order = np.lexsort((low, high))
    columns: dict[str, npt.NDArray[Any]] = {"key": high[order], "rest": low[order], "document": numbers[order]}
    _write(_range(folder / FOLDER / "hashes", part), columns)


def find_hashes(earlier: Sequence[Earlier], hashes: Hashes) -> Indices:
    """int64 [M]: the number of the earlier document with each of these hashes, -1 where there is none."""
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
    here = np.flatnonzero(np.isin(stored, part))
    rest = table["rest"].to_numpy()[here].view(np.uint32)
    return stored[here].tolist(), rest.tolist(), table["document"].to_numpy()[here].tolist()


def write_representatives(folder: Path, documents: Indices, representatives: Indices) -> None:
    columns = {"document": documents, "representative": representatives}
    _write(folder / FOLDER / "representatives.parquet", columns)


@dataclass(frozen=True)
class Representatives:
    """Who stays for earlier documents that do not. documents: ascending."""

    documents: Indices
    representatives: Indices

    @staticmethod
    def read(earlier: Sequence[Earlier]) -> Representatives:
        none = pa.table({"document": np.zeros(0, np.int64), "representative": np.zeros(0, np.int64)})
        tables = [pq.read_table(one.folder / FOLDER / "representatives.parquet") for one in earlier]
        table = pa.concat_tables([none, *tables]).sort_by("document")
        return Representatives(table["document"].to_numpy(), table["representative"].to_numpy())

    def has(self, numbers: Indices) -> npt.NDArray[np.bool_]:
        return np.isin(numbers, self.documents)

    def of(self, numbers: Indices) -> Indices:
        """Of each of these documents the one that stays, itself if it does."""
        found = numbers.copy()
        while (gone := self.has(found)).any():  # who stayed may have gone since, for an older one
            found[gone] = self.representatives[np.searchsorted(self.documents, found[gone])]
        return found


def _band_folder(folder: Path, band: int) -> Path:
    return folder / FOLDER / f"band-{band:02d}"


def halves(hashes: Hashes) -> tuple[Keys, npt.NDArray[np.uint32]]:
    """The first 64 and the next 32 bits of hashes in hexadecimal."""
    raw = np.frombuffer(bytes.fromhex(b"".join(one[:24] for one in hashes.tolist()).decode()), np.uint8).reshape(-1, 12)
    return (
        np.ascontiguousarray(raw[:, :8]).view(">u8").ravel().astype(np.uint64),
        np.ascontiguousarray(raw[:, 8:]).view(">u4").ravel().astype(np.uint32),
    )


def _range(folder: Path, part: int) -> Path:
    return folder / f"range-{part:05d}.parquet"


def _read_ranges(folder: Path, ranges: int, bits: int, wanted: Keys) -> Iterator[tuple[Keys, pa.Table]]:
    """The ranges that ascending keys fall into: those keys, and the file."""
    for part, (begin, end) in enumerate(range_bounds(wanted, bits, ranges)):
        if end > begin:
            yield wanted[begin:end], pq.read_table(_range(folder, part))


def range_bounds(keys: Keys, bits: int, ranges: int) -> list[tuple[int, int]]:
    """[begin, end) of each range of ascending keys: ranges have equal numbers of values of so many bits."""
    shift = np.uint64(bits - (ranges.bit_length() - 1))
    if ranges == 1:
        return [(0, len(keys))]
    ends = np.searchsorted(keys >> shift, np.arange(ranges, dtype=np.uint64), side="right").tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _signed(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Parquet packs differences of signed numbers; they wrap around as unsigned ones do."""
    return values.view(f"i{values.dtype.itemsize}")


def _write(path: Path, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Whole, or not there."""
    table = pa.table({name: _signed(values) for name, values in columns.items()})
    packed = [name for name in table.column_names if name != "rest"]
    encodings = {name: "DELTA_BINARY_PACKED" if name in packed else "PLAIN" for name in table.column_names}
    with whole_file(path) as temporary:
        pq.write_table(
            table,
            temporary,
            use_dictionary=False,
            column_encoding=encodings,
            compression="none",
            write_statistics=False,
        )
