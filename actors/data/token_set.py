"""The Tokens contract: packed sequences on disk, one token set per source.

    <folder>/index.json            lists the shards; written last
    <folder>/tokens-00000.bin      uint16 or uint32, little endian: sequences of `sequence_length`, one after another
    <folder>/starts-00000.parquet  positions of documents: one row per contiguous run of a document's tokens, in order

A document is `bos`, its tokens, `eos`; pipelines/tokenize/sequence_packing.py splits documents and packs sequences.
Two rules make every sequence readable from its tokens alone. A document's run ends with `eos` or with the sequence, so
a new document starts after every `eos`. The unused end of a sequence is filled with `pad`, a token that no document
contains. Token sets of different sources are mixed by the data worker, not here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moray.actors.data.token_files import TokenFiles, files_at
from moray.platform.core.atomic import write_json
from moray.platform.store.paths import AnyPath, write_file

SCHEMA_VERSION = 3  # 3: documents in pieces, and padding at the end of any sequence


@dataclass(frozen=True)
class TokenVocabulary:
    """The tokenizer's properties that a reader of tokens needs: fingerprint, size and special ids."""

    tokenizer: str
    size: int
    bos: int
    eos: int
    pad: int

    def __post_init__(self) -> None:
        """Raises ValueError if two of the special ids are equal, because document ends would then be ambiguous."""
        if len({self.bos, self.eos, self.pad}) < 3:
            raise ValueError(f"bos {self.bos}, eos {self.eos} and pad {self.pad} must be three different tokens")

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One token shard. tokens: without padding. bytes: UTF-8 size of its documents. largest: the largest token id."""

    number: int
    sequences: int
    tokens: int
    documents: int
    bytes: int
    largest: int
    sha256: str


@dataclass(frozen=True)
class StoredSequences:
    """Packed sequences as they are stored and sent to ranks: ids [n, sequence_length], uint16 or uint32. sources: of
    each, its index in the sorted names; None if unknown."""

    ids: npt.NDArray[np.unsignedinteger]
    eos: int
    pad: int
    sources: npt.NDArray[np.int32] | None = None

    def unpacked(self) -> Batch:
        """Documents and padding follow from the tokens, so they are not sent."""
        ids = self.ids.astype(np.int64)
        mask = np.logical_or.accumulate(ids[:, ::-1] != self.pad, axis=1)[:, ::-1]
        ends = (ids == self.eos).astype(np.int32)
        documents = np.cumsum(ends, axis=1, dtype=np.int32) - ends  # number of documents that ended before
        return Batch(ids, documents, np.ascontiguousarray(mask), self.sources)  # torch takes no reversed arrays


@dataclass(frozen=True)
class Batch:
    """Packed sequences; all arrays [n, sequence_length].

    documents: document numbers, from 0 in each sequence. mask: False for padding. sources: [n], indices in the sorted
    names of the sources; None if unknown.
    """

    ids: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    sources: npt.NDArray[np.int32] | None = None


def write_token_shard(folder: AnyPath, number: int, packed: npt.NDArray[np.unsignedinteger], pieces: pa.Table) -> Shard:
    """Writes one shard. packed: [n, sequence_length] in the vocabulary's dtype. pieces: the rows of the `starts` file
    (docs/formats.md), ordered by `start`."""
    data = packed.tobytes()
    sink = pa.BufferOutputStream()
    pq.write_table(pieces, sink, compression="zstd")
    write_file(folder / f"starts-{number:05d}.parquet", sink.getvalue().to_pybytes())
    write_file(folder / f"tokens-{number:05d}.bin", data)
    return Shard(
        number,
        sequences=len(packed),
        tokens=pc.sum(pieces["tokens"]).as_py() or 0,
        documents=pc.sum(pc.equal(pieces["part"], 0)).as_py() or 0,
        bytes=pc.sum(pieces["bytes"]).as_py() or 0,
        largest=int(packed.max(initial=0)),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def write_index(folder: Path, shards: Sequence[Shard], sequence_length: int, vocabulary: TokenVocabulary) -> None:
    """Writes `index.json`, which completes a token set."""
    write_json(
        folder / "index.json",
        {
            "schema_version": SCHEMA_VERSION,
            "sequence_length": sequence_length,
            "dtype": vocabulary.dtype.name,
            "vocabulary": asdict(vocabulary),
            "shards": [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.number)],
        },
    )


class TokenSet:
    """One source's token set. Sequences are numbered over all shards. Only requested parts of the files are read."""

    def __init__(self, files: TokenFiles, source: str, check: bool = True) -> None:
        """Raises ValueError if an id is outside the vocabulary, and with `check`, if a file's size does not match the
        index. Many readers of one folder need not all ask for the sizes of hundreds of thousands of files."""
        index = json.loads(files.read(f"{source}/index.json"))
        if index["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"{files}/{source}: the token set has schema version {index['schema_version']}; only version "
                f"{SCHEMA_VERSION} is supported"
            )
        self.source = source
        self.sequence_length: int = index["sequence_length"]
        self.vocabulary = TokenVocabulary(**index["vocabulary"])
        self.shards = [Shard(**shard) for shard in index["shards"]]
        self._files = files
        self._ends = np.cumsum([shard.sequences for shard in self.shards], dtype=np.int64)
        for shard in self.shards:
            path, expected = self._tokens(shard), shard.sequences * self._width
            if check and (found := files.size(path)) != expected:
                raise ValueError(f"{files}/{path} has {found} bytes; its index requires {expected}")
            if shard.largest >= self.vocabulary.size:
                raise ValueError(f"{files}/{path}: {self._outside(shard.largest)}")

    @property
    def sequences(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The sequences with these numbers, in this order. Raises ValueError as `stored` does."""
        return StoredSequences(self.stored(numbers), self.vocabulary.eos, self.vocabulary.pad).unpacked()

    def stored(self, numbers: Sequence[int]) -> npt.NDArray[np.unsignedinteger]:
        """The ids of the sequences with these numbers, in this order, in the vocabulary's dtype. Raises ValueError for
        an id outside the vocabulary, which the index did not record."""
        shards = np.searchsorted(self._ends, numbers, side="right").tolist()
        withins = [n - (int(self._ends[shard - 1]) if shard else 0) for n, shard in zip(numbers, shards, strict=True)]
        places = [(self._tokens(self.shards[shard]), n) for shard, n in zip(shards, withins, strict=True)]
        ids = self._files.rows(places, self._width).view(self.vocabulary.dtype)
        if (largest := ids.max(initial=0)) >= self.vocabulary.size:
            row = shards[int(ids.max(axis=1).argmax())]
            raise ValueError(f"{self._files}/{self._tokens(self.shards[row])}: {self._outside(largest)}")
        return ids

    def documents(self, shard: Shard) -> Iterator[tuple[str, npt.NDArray[np.int64], int]]:
        """(id, token ids with bos and eos, UTF-8 bytes) of every document of a shard, in the order of their first piece
        on disk. The pieces of a split document are joined."""
        tokens, rows = self.stream(shard), self.pieces(shard)
        found: dict[str, list[tuple[int, int, int]]] = {}
        sizes: dict[str, int] = {}
        columns = (rows[name].to_pylist() for name in ("id", "part", "start", "tokens", "bytes"))
        for name, part, start, count, size in zip(*columns, strict=True):
            found.setdefault(name, []).append((part, start, count))
            sizes[name] = sizes.get(name, 0) + size
        for name, parts in found.items():
            yield (
                name,
                np.concatenate([tokens[start : start + count] for _, start, count in sorted(parts)]),
                sizes[name],
            )

    def pieces(self, shard: Shard) -> pa.Table:
        """The rows of a shard's `starts` file."""
        return pq.read_table(pa.BufferReader(self._files.read(f"{self.source}/starts-{shard.number:05d}.parquet")))

    def stream(self, shard: Shard) -> npt.NDArray[np.int64]:
        """All tokens of a shard, sequence after sequence, with padding."""
        return np.frombuffer(self._files.read(self._tokens(shard)), self.vocabulary.dtype).astype(np.int64)

    def _outside(self, largest: int) -> str:
        return f"token id {largest} is outside the vocabulary of {self.vocabulary.size}"

    @property
    def _width(self) -> int:
        """Bytes of a sequence."""
        return self.sequence_length * self.vocabulary.dtype.itemsize

    def _tokens(self, shard: Shard) -> str:
        return f"{self.source}/tokens-{shard.number:05d}.bin"


def open_token_sets(address: str, check: bool = True) -> dict[str, TokenSet]:
    """The token sets under a folder or an `s3://` address, by source. check: the sizes of all files.

    Raises ValueError if there are none, or if their tokenizers or sequence lengths differ.
    """
    files = files_at(address)
    sets = {source: TokenSet(files, source, check) for source in files.sources()}
    if not sets:
        raise ValueError(f"{address} contains no token set (*/index.json)")
    if len({(s.vocabulary, s.sequence_length) for s in sets.values()}) > 1:
        raise ValueError(f"{address}: token sets of different tokenizers or sequence lengths cannot be mixed")
    return sets
