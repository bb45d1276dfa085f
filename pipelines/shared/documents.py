"""The Documents contract: Parquet shards of text with stable ids.

    id       128-bit hash of (source, key within the source), hex: the same document always has the same id
    text     the document
    source   name of its source in the recipe
    license  as stated in the recipe, '' if unknown
    meta     arbitrary string pairs

Steps pass on columns that they do not know. The order of rows has no meaning; ties are finally broken by (content
hash, id).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from moray.platform.store.paths import AnyPath, list_files, local_file, new_file

QUALITY = "quality"  # an optional column: dedup keeps the duplicate with the higher quality
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("text", pa.large_string()),
        pa.field("source", pa.string()),
        pa.field("license", pa.string()),
        pa.field("meta", pa.map_(pa.string(), pa.string())),
    ]
)


def document_id(source: str, key: str) -> str:
    """32 hex characters. A NUL separates the two, so ("a", "bc") and ("ab", "c") differ."""
    return xxhash.xxh3_128_hexdigest(f"{source}\0{key}".encode())


def content_hash(text: str) -> str:
    """32 hex characters over the text's UTF-8 bytes."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def shard_name(number: int) -> str:
    return f"documents-{number:05d}.parquet"


def shard_sizes(folder: AnyPath) -> dict[str, int]:
    """Names of the shards of a Documents folder, in order, and their sizes in bytes. Raises ValueError if there are
    none."""
    found = list_files(folder, "documents-*.parquet")
    if not found:
        raise ValueError(f"{folder} holds no documents-*.parquet")
    return found


def shard_paths(folder: AnyPath) -> list[AnyPath]:
    """The shards of a Documents folder, in order. Raises ValueError if there are none."""
    return [folder / name for name in shard_sizes(folder)]


def read_shard(path: AnyPath, columns: Sequence[str] | None = None) -> pa.Table:
    with local_file(path) as local:
        return pq.read_table(local, columns=list(columns) if columns else None)


def write_shard(path: AnyPath, table: pa.Table) -> None:
    """Writes one shard atomically. Raises ValueError if a contract column is missing or of another type."""
    for field in SCHEMA:
        index = table.schema.get_field_index(field.name)
        if index < 0 or table.schema.field(index).type != field.type:
            raise ValueError(f"{path.name}: column {field.name!r} must be {field.type}")
    write_parquet(path, table)


def write_parquet(path: AnyPath, table: pa.Table) -> None:
    """Writes any table as zstd Parquet, atomically."""
    write_batches(path, table.schema, [table])


def write_batches(path: AnyPath, schema: pa.Schema, tables: Iterable[pa.Table], plain: bool = False) -> None:
    """As `write_parquet`, for tables that need not fit in memory together."""
    with parquet_writer(path, schema, plain) as writer:
        for table in tables:
            writer.write_table(table)


@contextlib.contextmanager
def parquet_writer(path: AnyPath, schema: pa.Schema, plain: bool = False) -> Iterator[pq.ParquetWriter]:
    """A writer of zstd Parquet. The file gets its name when the block ends without an error. plain: without compression
    and dictionary encoding, for hashes, which neither makes smaller."""
    compression = "none" if plain else "zstd"
    with (
        new_file(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression=compression, use_dictionary=not plain) as writer,
    ):
        yield writer


def text_bytes(texts: pa.Array | pa.ChunkedArray) -> int:
    """Number of UTF-8 bytes in a column of strings."""
    return int(pc.sum(pc.binary_length(texts)).as_py() or 0)
