"""The readers a source can name: each reads a file into documents and rejects.

A reader never raises for bad content. Files ending in .gz or .zst are decompressed as they are read. A file that is
truncated or does not decompress counts once as `malformed`, after the content before the damage. Memory is bounded by
`max_bytes`, not by the size of a file, because a few KB of .gz can hold GBs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from moray.pipelines.corpus.pieces import Piece
from moray.pipelines.corpus.rows import Columns, read_huggingface, read_jsonl, read_parquet
from moray.pipelines.corpus.source_file import File
from moray.pipelines.corpus.text_readers import read_pythonbible, read_text
from moray.pipelines.corpus.warc import read_warc
from moray.pipelines.corpus.web import read_html


class Reader(Protocol):
    """Reads one file. Documents of more than `max_bytes` UTF-8 bytes are rejected."""

    def __call__(self, file: File, max_bytes: int, columns: Columns, /) -> Iterator[Piece]: ...


READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "huggingface": read_huggingface,
    "html": read_html,
    "warc": read_warc,
    "pythonbible": read_pythonbible,
}
ROW_READERS = ("jsonl", "parquet", "huggingface")
