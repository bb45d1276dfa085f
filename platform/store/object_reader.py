"""One version of an object in a bucket as a seekable file. It is read in ranges, on demand."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moray.platform.store.bucket import Bucket

BLOCK = 4 << 20  # bytes of an object per request


class ObjectReader(io.RawIOBase):
    """A file object over one object with this size and ETag. Buffers one block of `block` bytes. Raises InputError if
    the object was replaced, because two versions must not be mixed."""

    def __init__(self, bucket: Bucket, key: str, size: int, etag: str, block: int = BLOCK) -> None:
        self._bucket, self._key, self._least = bucket, key, block
        self._size, self._etag = size, etag
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
        """Fills the whole buffer unless the object ends, because Arrow treats a short read as the end of the file."""
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and self._at < self._size:
            if not self._begin <= self._at < self._begin + len(self._block):
                end = min(self._size, self._at + max(self._least, len(target) - done))
                self._block = self._bucket.read_range(self._key, self._at, end, self._etag)
                self._begin = self._at
            start = self._at - self._begin
            part = self._block[start : start + len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        return done
