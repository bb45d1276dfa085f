"""A file of a source, on this machine or in a bucket, as bytes: opened, decompressed by its name, cut into lines.

Objects are read in ranges as they are needed, and only the version that was listed: one that is replaced meanwhile ends
the run instead of mixing two. An outage is an InputError, which no reader takes for bad data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from moray.pipelines.corpus.pieces import MALFORMED, UNREADABLE, Reject

if TYPE_CHECKING:
    from moray.platform.bucket import Bucket

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_BUFFER = 1 << 16
_BLOCK = 4 << 20  # bytes of an object asked for at once


@dataclass(frozen=True)
class File:
    """Where a file lies, and its size in bytes. Of an object: its address, ETag, and the `root` it was listed below."""

    place: str
    size: int = 0
    etag: str = ""
    root: str = ""

    @property
    def is_object(self) -> bool:
        return bool(self.root)

    @property
    def suffixes(self) -> list[str]:
        return [suffix.lower() for suffix in Path(self.place).suffixes]

    @property
    def is_compressed(self) -> bool:
        return self.suffixes[-1:] != [] and self.suffixes[-1] in _COMPRESSION

    def open(self) -> pa.NativeFile:
        """The bytes as they lie there, seekable. Raises OSError (or InputError for a bucket)."""
        if self.is_object:
            return pa.PythonFile(ObjectReader(self), mode="r")
        return pa.OSFile(self.place)

    def stream(self) -> io.BufferedReader:
        """The bytes, decompressed if the name says that they are compressed. Raises OSError."""
        file = self.open()
        # pyarrow's streams read like raw files but are not declared as such.
        stream: Any = pa.CompressedInputStream(file, _COMPRESSION[self.suffixes[-1]]) if self.is_compressed else file
        return io.BufferedReader(stream, _BUFFER)

    def damage(self, error: Exception) -> Reject:
        """What an error in the middle of the file means: a bad archive, or for a plain file a bad disk."""
        return Reject("", MALFORMED if self.is_compressed else UNREADABLE, words(error))


def unreadable(error: Exception) -> Reject:
    return Reject("", UNREADABLE, words(error))


def words(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def lines(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one of more than `limit` bytes, which is skipped without keeping it."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_BUFFER)) and not rest.endswith(b"\n"):
            pass
        yield None


class ObjectReader(io.RawIOBase):
    """One version of an object as a seekable file; holds one block of it."""

    def __init__(self, file: File) -> None:
        self._bucket, self._key = bucket_at(file.root), file.place.removeprefix(f"{file.root}/")
        self._size, self._etag = file.size, file.etag
        self._at, self._begin, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills the whole buffer unless the object ends: Arrow takes a short read for the end."""
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and self._at < self._size:
            if not self._begin <= self._at < self._begin + len(self._block):
                end = min(self._size, self._at + max(_BLOCK, len(target) - done))
                self._block = self._bucket.read_range(self._key, self._at, end, self._etag)
                self._begin = self._at
            start = self._at - self._begin
            part = self._block[start : start + len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        return done


@lru_cache(maxsize=64)
def bucket_at(url: str) -> Bucket:
    """A bucket, or a folder in one, whose client is kept: it holds connections."""
    from moray.platform.bucket import Bucket

    return Bucket(url)
