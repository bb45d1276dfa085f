"""Reads Megatron-LM's indexed datasets: PREFIX.bin has the ids, PREFIX.idx their type and the bounds of documents.

    .idx  "MMIDIDX\\0\\0"  magic, 9 bytes
          uint64 1         version
          uint8            type of the ids, a key of DTYPES
          uint64 S, D      numbers of sequences and of document bounds
          int32 [S]        length of each sequence, in ids
          int64 [S]        byte in .bin at which each sequence begins
          int64 [D]        number of the first sequence of each document, then S: there are D - 1 documents

All little endian. Both files are read in ranges, and every range is checked against its neighbours.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moray.pipelines.corpus.source_file import File
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.tokenize.pretokenized.stored_ids import LARGEST_DOCUMENT, READ_BYTES, StoredIds, read_exactly
from moray.platform.core.errors import InputError

DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_MAGIC, _OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DOCUMENTS = 1 << 16  # bounds read at once
_SEQUENCES = 1 << 20
_SIZE, _POINTER = np.dtype("<i4"), np.dtype("<i8")


class _Sequences(NamedTuple):
    """Consecutive sequences: their first byte in .bin, and the number of ids before each and, last, of all [n + 1]."""

    begin: int
    ends: Indices


@dataclass(frozen=True)
class MegatronFiles:
    """A pair of files. sequences, documents: their numbers. tokens: ids in .bin."""

    index: File
    data: File
    dtype: np.dtype[Any]
    sequences: int
    documents: int

    @property
    def tokens(self) -> int:
        return self.data.size // self.dtype.itemsize

    def read(self, first: int, last: int) -> Iterator[StoredIds]:
        """Documents [first, last), some at a time. Raises InputError for bounds that do not fit together."""
        at = first
        while at < last:
            bounds = self._bounds(at, min(last, at + _DOCUMENTS))
            # Documents of many sequences: fewer at a time, but at least one.
            count = max(1, int(np.searchsorted(bounds, bounds[0] + _SEQUENCES, side="right")) - 1)
            count = min(count, len(bounds) - 1)
            sequences = self._sequences(int(bounds[0]), int(bounds[count]))
            yield from self._documents(at, sequences, bounds[: count + 1])
            at += count

    def _documents(self, first: int, sequences: _Sequences, bounds: Indices) -> Iterator[StoredIds]:
        """The documents whose first sequences, and the end of the last, are `bounds`, about READ_BYTES at a time."""
        ends = sequences.ends[bounds - bounds[0]]
        largest = int(np.diff(ends).max(initial=0))
        if largest > LARGEST_DOCUMENT:
            raise self._wrong(
                f"document {first + int(np.diff(ends).argmax())} has {largest} ids; the most is {LARGEST_DOCUMENT}",
                "preprocess the data again, with an end of document after each document",
            )
        at, step = 0, READ_BYTES // self.dtype.itemsize
        while at < len(ends) - 1:
            end = max(at + 1, int(np.searchsorted(ends, ends[at] + step, side="right")) - 1)
            begin = sequences.begin + int(ends[at]) * self.dtype.itemsize
            size = int(ends[end] - ends[at]) * self.dtype.itemsize
            ids = np.frombuffer(read_exactly(self.data, begin, size), self.dtype)
            yield StoredIds(first + at, ids, ends[at : end + 1] - ends[at])
            at = end

    def _bounds(self, first: int, last: int) -> Indices:
        """The first sequence of each of the documents [first, last), and the end of the last one."""
        offset = _HEADER.size + self.sequences * (_SIZE.itemsize + _POINTER.itemsize)
        found = self._array(offset, _POINTER, first, last + 1)
        if (np.diff(found) < 0).any() or found[0] < 0 or found[-1] > self.sequences:
            raise self._wrong(f"the bounds of the documents {first} to {last - 1} are not in order")
        return found

    def _sequences(self, first: int, last: int) -> _Sequences:
        """The sequences [first, last), which must follow one another and the one before them."""
        start = max(0, first - 1)
        sizes = self._array(_HEADER.size, _SIZE, start, last)
        begins = self._array(_HEADER.size + self.sequences * _SIZE.itemsize, _POINTER, start, last)
        if not len(sizes):
            return _Sequences(0, np.zeros(1, np.int64))
        ends = begins + sizes * self.dtype.itemsize
        expected = np.concatenate([[0 if start == 0 else begins[0]], ends[:-1]])
        if (sizes < 0).any() or (begins != expected).any():
            n = int(((sizes < 0) | (begins != expected)).argmax())
            raise self._wrong(f"sequence {start + n} of {sizes[n]} ids is at byte {begins[n]}, not {expected[n]}")
        own = first - start
        begin = int(begins[own]) if own < len(begins) else int(ends[-1])
        return _Sequences(begin, np.concatenate([[0], np.cumsum(sizes[own:])]))

    def _array(self, offset: int, dtype: np.dtype[Any], first: int, last: int) -> Indices:
        data = read_exactly(self.index, offset + first * dtype.itemsize, (last - first) * dtype.itemsize)
        return np.frombuffer(data, dtype).astype(np.int64)

    def check(self) -> None:
        """Raises InputError if the documents do not cover the sequences, or these do not cover .bin."""
        first, last = (int(self._bounds(n, n)[0]) for n in (0, self.documents))
        if (first, last) != (0, self.sequences):
            raise self._wrong(
                f"its documents have the sequences {first} to {last}; there are {self.sequences}",
                "preprocess the data again; the writer must end its last document",
            )
        tail = self._sequences(max(0, self.sequences - 1), self.sequences)
        required = tail.begin + int(tail.ends[-1]) * self.dtype.itemsize
        if required != self.data.size:
            reason = "it is truncated" if self.data.size < required else "it belongs to another index"
            raise InputError(
                f"{self.data.location} has {self.data.size} bytes, but {self.index.location} describes {required}: "
                f"{reason}",
                "copy both files again",
            )

    def _wrong(self, text: str, hint: str = "copy both files again, or preprocess the data again") -> InputError:
        return InputError(f"{self.index.location}: {text}", hint)


def open_megatron(index: File, data: File) -> MegatronFiles:
    """Reads and checks the header of a pair. Raises InputError."""
    if index.size < _HEADER.size:
        raise InputError(f"{index.location} has {index.size} bytes, less than its header", "copy it again")
    magic, version, code, sequences, bounds = _HEADER.unpack(read_exactly(index, 0, _HEADER.size))
    if magic != _MAGIC:
        old = magic.startswith(_OLD_MAGIC)
        raise InputError(
            f"{index.location} {'has the old format of fairseq' if old else 'is no index of Megatron-LM'}: it begins "
            f"with {magic!r}, not {_MAGIC!r}",
            "preprocess the data with Megatron-LM's tools/preprocess_data.py, or exclude the file",
        )
    if version != 1 or code not in DTYPES:
        problem = f"version {version}" if version != 1 else f"type code {code}"
        raise InputError(
            f"{index.location}: {problem} is unknown", f"known: version 1, type codes {min(DTYPES)} to {max(DTYPES)}"
        )
    if not bounds:
        raise InputError(f"{index.location} has no document bounds", "preprocess the data again")
    required = _HEADER.size + sequences * (_SIZE.itemsize + _POINTER.itemsize) + bounds * _POINTER.itemsize
    if index.size != required:
        modes = "; it has modes of sequences, as multimodal data" if index.size == required + sequences else ""
        raise InputError(
            f"{index.location} has {index.size} bytes, but its header requires {required}{modes}",
            "only text is supported" if modes else "copy it again",
        )
    files = MegatronFiles(index, data, np.dtype(DTYPES[code]), sequences, bounds - 1)
    files.check()
    return files
