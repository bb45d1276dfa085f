"""The Tokens contract: packed sequences on disk, one token set per source.

    <folder>/index.json            what is below; written last
    <folder>/tokens-00000.bin      uint16 or uint32, little endian: sequences of `sequence_length`, one after another
    <folder>/starts-00000.parquet  id, start, tokens, bytes of every document, in order; start counts from the shard's
                                   first token

A document is `bos`, its tokens, `eos`. Documents follow one another and are cut only by sequence ends; the last
sequence of a shard is filled with `pad`. Nothing here mixes sources: that is the loader's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moray.actors.token_files import TokenFiles, files_at
from moray.platform.atomic import write_bytes, write_json

SCHEMA_VERSION = 2  # 2: with the largest id of each shard


@dataclass(frozen=True)
class Vocabulary:
    """What a reader of tokens must know of the tokenizer: its fingerprint, size and special ids."""

    tokenizer: str
    size: int
    bos: int
    eos: int
    pad: int

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One token shard. `tokens` counts without padding, `bytes` is the UTF-8 size of its documents, `largest` the
    largest token id."""

    number: int
    sequences: int
    tokens: int
    documents: int
    bytes: int
    largest: int
    sha256: str


@dataclass(frozen=True)
class Batch:
    """Packed sequences: all arrays [n, sequence_length]; documents are numbered from 0 in each sequence.

    `mask` is False where a token is padding.
    """

    ids: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]


def write_shard(
    folder: Path,
    number: int,
    documents: Sequence[tuple[str, Sequence[int], int]],
    sequence_length: int,
    vocabulary: Vocabulary,
) -> Shard:
    """Packs `documents` (id, token ids without bos and eos, UTF-8 bytes) into one shard.

    Raises ValueError if a token id is not below the vocabulary's size.
    """
    pieces, starts, lengths = [], [], []
    at = 0
    for name, ids, _ in documents:
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocabulary.size:
            raise ValueError(f"document {name}: token ids {min(ids)}..{max(ids)} outside 0..{vocabulary.size - 1}")
        piece = np.empty(len(ids) + 2, vocabulary.dtype)
        piece[0], piece[1:-1], piece[-1] = vocabulary.bos, ids, vocabulary.eos
        pieces.append(piece)
        starts.append(at)
        lengths.append(len(piece))
        at += len(piece)
    sequences = -(-at // sequence_length)
    packed = np.full(sequences * sequence_length, vocabulary.pad, vocabulary.dtype)
    packed[:at] = np.concatenate(pieces) if pieces else 0
    data = packed.tobytes()
    table = pa.table(
        {
            "id": pa.array([name for name, _, _ in documents], pa.string()),
            "start": pa.array(starts, pa.int64()),
            "tokens": pa.array(lengths, pa.int64()),
            "bytes": pa.array([size for _, _, size in documents], pa.int64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(folder / f"starts-{number:05d}.parquet", sink.getvalue().to_pybytes())
    write_bytes(folder / f"tokens-{number:05d}.bin", data)
    total = sum(size for _, _, size in documents)
    largest = int(packed.max(initial=0))
    return Shard(number, sequences, at, len(documents), total, largest, hashlib.sha256(data).hexdigest())


def write_index(folder: Path, shards: Sequence[Shard], sequence_length: int, vocabulary: Vocabulary) -> None:
    """Writes `index.json`, which makes the shards a token set."""
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
    """One source's token set. Sequences are numbered over all shards; of its files, only what is asked for is read."""

    def __init__(self, files: TokenFiles, source: str) -> None:
        """Raises ValueError if the index and the files disagree in size, or if an id is beyond the vocabulary."""
        index = json.loads(files.read(f"{source}/index.json"))
        if index["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"{files}/{source}: token set of schema {index['schema_version']}, this reads {SCHEMA_VERSION}"
            )
        self.source = source
        self.sequence_length: int = index["sequence_length"]
        self.vocabulary = Vocabulary(**index["vocabulary"])
        self.shards = [Shard(**shard) for shard in index["shards"]]
        self._files = files
        self._ends = np.cumsum([shard.sequences for shard in self.shards], dtype=np.int64)
        for shard in self.shards:
            path, expected = self._tokens(shard), shard.sequences * self._width
            if (found := files.size(path)) != expected:
                raise ValueError(f"{files}/{path}: {found} bytes, its index says {expected}")
            if shard.largest >= self.vocabulary.size:
                raise ValueError(f"{files}/{path}: {self._beyond(shard.largest)}")

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
        """The sequences with these numbers, in this order. ValueError for an id that the index did not tell of."""
        length = self.sequence_length
        shards = np.searchsorted(self._ends, numbers, side="right").tolist()
        withins = [n - (int(self._ends[shard - 1]) if shard else 0) for n, shard in zip(numbers, shards, strict=True)]
        places = [(self._tokens(self.shards[shard]), n) for shard, n in zip(shards, withins, strict=True)]
        ids = self._files.rows(places, self._width).view(self.vocabulary.dtype).astype(np.int64)
        if (largest := ids.max(initial=0)) >= self.vocabulary.size:
            row = shards[int(ids.max(axis=1).argmax())]
            raise ValueError(f"{self._files}/{self._tokens(self.shards[row])}: {self._beyond(largest)}")
        mask = np.ones(ids.shape, np.bool_)
        for row, (shard, within) in enumerate(zip(shards, withins, strict=True)):
            mask[row, max(0, self.shards[shard].tokens - within * length) :] = False
        # Every document begins with bos, so counting them numbers the documents; a sequence that begins inside a
        # document begins with number 0 as well, because the first token never raises the count.
        documents = np.cumsum(ids == self.vocabulary.bos, axis=1, dtype=np.int32)
        return Batch(ids, documents - documents[:, :1], mask)

    def documents(self, shard: Shard) -> pa.Table:
        """id, start, tokens, bytes of every document of a shard."""
        return pq.read_table(pa.BufferReader(self._files.read(f"{self.source}/starts-{shard.number:05d}.parquet")))

    def stream(self, shard: Shard) -> npt.NDArray[np.int64]:
        """All tokens of a shard, without padding."""
        flat = np.frombuffer(self._files.read(self._tokens(shard)), self.vocabulary.dtype)
        return flat[: shard.tokens].astype(np.int64)

    def _beyond(self, largest: int) -> str:
        return f"token id {largest} is beyond its vocabulary of {self.vocabulary.size}"

    @property
    def _width(self) -> int:
        """Bytes of a sequence."""
        return self.sequence_length * self.vocabulary.dtype.itemsize

    def _tokens(self, shard: Shard) -> str:
        return f"{self.source}/tokens-{shard.number:05d}.bin"


def open_token_sets(address: str) -> dict[str, TokenSet]:
    """The token sets under a folder or an `s3://` address, by source.

    ValueError if there are none or their tokenizers differ.
    """
    files = files_at(address)
    sets = {source: TokenSet(files, source) for source in files.sources()}
    if not sets:
        raise ValueError(f"{address} holds no token set (*/index.json)")
    if len({(s.vocabulary, s.sequence_length) for s in sets.values()}) > 1:
        raise ValueError(f"{address}: token sets of different tokenizers or sequence lengths cannot be mixed")
    return sets
