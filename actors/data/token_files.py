"""Access to a token set's files: reads at positions in a folder, or ranged requests in an S3 bucket.

A batch reads sequences at random positions. Each costs a page on disk, or a request to S3; many requests run at once.
Requests are retried after 5xx responses, broken connections and timeouts (`platform/store/bucket.py`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from moray.platform.store.paths import StorePath, local_file

_CONCURRENT_REQUESTS = 32
_OPEN = 256  # files
_AHEAD = 32  # places that the system reads ahead
_READ_TIMEOUT = 10.0  # seconds without data after which a request is retried

Bytes = npt.NDArray[np.uint8]


class TokenFiles(Protocol):
    """The files of token sets under one root."""

    def sources(self) -> list[str]:
        """The folders that contain an index, sorted."""

    def read(self, path: str) -> bytes:
        """Contents of a file."""

    def size(self, path: str) -> int:
        """Size of a file in bytes."""

    def rows(self, places: Sequence[tuple[str, int]], width: int) -> Bytes:
        """Rows of `width` bytes, uint8 [n, width]. places: (file, row number) of each."""


class FolderFiles:
    """Files under a folder. At most _OPEN of them are open: a corpus has hundreds of thousands."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()  # the last used is last

    def __str__(self) -> str:
        return str(self._folder)

    def sources(self) -> list[str]:
        return sorted(path.parent.name for path in self._folder.glob("*/index.json"))

    def read(self, path: str) -> bytes:
        return (self._folder / path).read_bytes()

    def size(self, path: str) -> int:
        return (self._folder / path).stat().st_size

    def rows(self, places: Sequence[tuple[str, int]], width: int) -> Bytes:
        rows = np.empty((len(places), width), np.uint8)
        for path, number in places[:_AHEAD]:
            self._announce(path, number * width, width)
        for at, (row, (path, number)) in enumerate(zip(rows, places, strict=True)):
            for path_ahead, number_ahead in places[at + _AHEAD : at + _AHEAD + 1]:
                self._announce(path_ahead, number_ahead * width, width)
            if os.preadv(self._file(path).fileno(), [row.data], number * width) != width:
                raise ValueError(f"{self._folder / path} ends before its index says")
        return rows

    def _announce(self, path: str, begin: int, size: int) -> None:
        """Makes the system read ahead, so that slow storage reads many places at once."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file(path).fileno(), begin, size, os.POSIX_FADV_WILLNEED)

    def _file(self, path: str) -> BinaryIO:
        file = self._open.pop(path, None) or (self._folder / path).open("rb", buffering=0)
        self._open[path] = file
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)[1].close()
        return file


class BucketFiles:
    """Objects under `s3://bucket/prefix`. Every failed request raises an InputError that names the object."""

    def __init__(self, url: str) -> None:
        from moray.platform.store.bucket import Bucket  # imports boto3, which is slow

        self._bucket = Bucket(url, read_seconds=_READ_TIMEOUT)
        self._threads = ThreadPoolExecutor(_CONCURRENT_REQUESTS, "tokens")
        self._sizes: dict[str, int] = {}

    def __str__(self) -> str:
        return self._bucket.url

    def sources(self) -> list[str]:
        return [name for name in sorted(self._bucket.folders()) if f"{name}/index.json" in self._listing()]

    def read(self, path: str) -> bytes:
        # From the host's cache: every rank of a host reads the indexes.
        with local_file(StorePath(self._bucket.url, path)) as local:
            return local.read_bytes()

    def size(self, path: str) -> int:
        try:
            return self._listing()[path]
        except KeyError:
            raise FileNotFoundError(f"{self}/{path} is missing") from None

    def rows(self, places: Sequence[tuple[str, int]], width: int) -> Bytes:
        def read(place: tuple[str, int]) -> bytes:
            path, number = place
            return self._bucket.read_range(path, number * width, (number + 1) * width)

        data = b"".join(self._threads.map(read, places))
        return np.frombuffer(data, np.uint8).reshape(-1, width)

    def _listing(self) -> dict[str, int]:
        if not self._sizes:
            self._sizes = {item.key: item.size for item in self._bucket.objects()}
        return self._sizes


def files_at(address: str) -> TokenFiles:
    """The files under a folder or an `s3://` address."""
    return BucketFiles(address) if address.startswith("s3://") else FolderFiles(Path(address))
