"""A file of a source, on this machine or in a bucket, as bytes: opened, decompressed, split into lines.

Objects are read in ranges on demand, and only in the version that was listed. If an object is replaced meanwhile, the
run ends, because two versions must not be mixed. An outage raises InputError, which no reader treats as bad data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from moray.pipelines.corpus.pieces import MALFORMED, UNREADABLE, Reject
from moray.pipelines.corpus.unpack import Damaged, DecompressedFile, compression_of
from moray.platform.store.manifest import hash_file
from moray.platform.store.object_reader import ObjectReader
from moray.platform.store.paths import bucket_at

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_BUFFER = 1 << 16


@dataclass(frozen=True)
class File:
    """Path and size in bytes of a file. For an object: its URL, ETag, and the `root` URL it was listed under. sha256:
    if it is known already."""

    location: str
    size: int = 0
    etag: str = ""
    root: str = ""
    sha256: str = ""

    @property
    def is_object(self) -> bool:
        return bool(self.root)

    @property
    def suffixes(self) -> list[str]:
        return [suffix.lower() for suffix in Path(self.location).suffixes]

    @property
    def is_compressed(self) -> bool:
        return self.suffixes[-1:] != [] and self.suffixes[-1] in _COMPRESSION

    def open(self) -> pa.NativeFile:
        """The stored bytes, seekable. Raises OSError (or InputError for a bucket)."""
        return pa.PythonFile(self._raw(), mode="r")  # Arrow's own files accept only UTF-8 names

    def _raw(self) -> Any:
        _opened[:] = [self._object() if self.is_object else io.FileIO(self.location)]
        return _opened[0]

    def _object(self) -> ObjectReader:
        key = self.location.removeprefix(f"{self.root}/")
        return ObjectReader(bucket_at(self.root), key, self.size, self.etag)

    def stream(self, resume: bool = False) -> io.BufferedReader:
        """The bytes, decompressed if the magic bytes or the name indicate compression.

        resume: after damage, continue with the next member. Raises OSError, also in the middle of the file.
        """
        raw = self._raw()
        try:
            beginning = raw.read(4)
            raw.seek(0)
        except BaseException:
            raw.close()
            raise
        if kind := compression_of(beginning) or (self.is_compressed and _COMPRESSION[self.suffixes[-1]]):
            raw = DecompressedFile(raw, kind, resume)
        return io.BufferedReader(raw, _BUFFER)

    def damage(self, error: Exception) -> Reject:
        """The reject for an error in the middle of the file: malformed for a bad archive, unreadable for a bad disk."""
        return Reject("", MALFORMED if isinstance(error, Damaged) else UNREADABLE, error_text(error))


def content_digest(file: File) -> str:
    """The ETag of an object, as reported by its server, or the SHA-256 of a local or submitted file."""
    if file.sha256:
        return file.sha256
    if file.is_object:
        return f"etag:{file.etag}"
    try:
        return hash_file(Path(file.location))
    except OSError:
        return "unreadable"


def trailing_data(stream: io.BufferedReader) -> Iterator[Reject]:
    """A reject if a compressed stream, read to its end, has other data after the last member."""
    if problem := getattr(stream.raw, "trailing", ""):
        yield Reject("", MALFORMED, problem)


_opened: list[Any] = []  # the most recently opened file


def bytes_read() -> int:
    """Position of this process in the file that it opened last; 0 if that is closed."""
    return int(_opened[0].tell()) if _opened and not _opened[0].closed else 0


def unreadable(error: Exception) -> Reject:
    return Reject("", UNREADABLE, error_text(error))


def error_text(error: Exception) -> str:
    """The message of an error, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_lines(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """The lines of a file; None for a line of more than `limit` bytes, which is skipped and not buffered."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_BUFFER)) and not rest.endswith(b"\n"):
            pass
        yield None
