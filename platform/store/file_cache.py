"""The cache of one host: copies of objects in the store, shared by all processes of the host.

    <root>/ab/abcd...      one object, named by a hash of its address and ETag
    <root>/.ab.lock        held while an object whose name begins with ab is downloaded
    <root>/.size           the total size in bytes; corrected whenever files are evicted
    <root>/.tmp/           unfinished downloads and uploads, named by the process that writes them

An object is downloaded once, however many processes ask for it. A process that uses a copy holds a shared lock on it.
If the cache is larger than its limit, the least recently used copies without a lock are removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from moray.platform.core.atomic import is_full, sync
from moray.platform.core.errors import InputError
from moray.platform.core.processes import boot, pid_namespace
from moray.platform.core.units import size as size_text
from moray.platform.store.lease import is_alive

if TYPE_CHECKING:
    from moray.platform.store.bucket import Bucket

_PART = 16 << 20  # bytes per request
_CONNECTIONS = 4
_EVICTED_SHARE = 0.1  # evict this much more than needed, so that not every download scans the cache


@dataclass(frozen=True)
class FileCache:
    """The cache in `root`, which is created when needed. limit: bytes. Files in use may exceed it."""

    root: Path
    limit: int

    @contextlib.contextmanager
    def file(self, bucket: Bucket, key: str, etag: str, size: int) -> Iterator[Path]:
        """Yields the path of the object's copy, which is not removed during the block.

        Raises InputError if the object was replaced by another version, or if the disk is full.
        """
        name = hashlib.sha256(f"{bucket.url}/{key}\0{etag}".encode()).hexdigest()
        path = self.root / name[:2] / name
        while (held := _hold(path, fcntl.LOCK_SH)) is None:
            self._download(bucket, key, etag, size, path)
        with held:
            os.utime(path)
            yield path

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """Yields the path of an empty file on the cache's disk, which is removed after the block."""
        path = self._unused()
        path.touch()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Yields the path of an empty folder on the cache's disk, which is removed after the block."""
        path = self._unused()
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _download(self, bucket: Bucket, key: str, etag: str, size: int, path: Path) -> None:
        """Downloads an object to `path`, unless another process has done it meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.root / f".{path.parent.name}.lock"):
            if path.exists():
                return
            self._make_room(size)
            with self.temporary() as temporary:
                try:
                    _fetch(bucket, key, etag, size, temporary)
                except OSError as error:
                    if not is_full(error):
                        raise
                    raise InputError(
                        f"not enough disk space in {self.root} for {bucket.url}/{key} ({size_text(size)})",
                        "free some, or set MORAY_HOME to a larger disk; MORAY_CACHE_BYTES limits the cache",
                    ) from error
                sync(temporary)  # a copy is not verified again: after a power failure, it must be whole or absent
                temporary.rename(path)

    def _make_room(self, size: int) -> None:
        """Adds `size` to the total. If that exceeds the limit, evicts copies that no process uses."""
        with _locked(self.root / ".evict.lock"):
            counter = self.root / ".size"
            total = size + _number(counter)
            if total > self.limit:
                total = size + self._evict(self.limit * (1 - _EVICTED_SHARE) - size)
            counter.write_text(str(total))

    def _evict(self, target: float) -> int:
        """Removes the least recently used copies until at most `target` bytes are left. Returns the bytes left."""
        copies = []
        for path in self.root.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= target:
                break
            if (held := _hold(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
                with held:
                    path.unlink()
                total -= size
        return total

    def _unused(self) -> Path:
        folder = self.root / ".tmp"
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if not _is_abandoned(old.name):
                continue
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)  # another process may remove it at the same time
            else:
                old.unlink(missing_ok=True)
        return folder / "-".join([*_here(), str(os.getpid()), secrets.token_hex(8)])


def _here() -> tuple[str, str, str]:
    """Short names of this host, its boot, and the process ids that this process sees. Hosts and containers may share
    the cache's folder."""
    named = (socket.gethostname(), boot(), pid_namespace())
    host, start, pids = (hashlib.sha256(str(one).encode()).hexdigest()[:8] for one in named)
    return host, start, pids


def _is_abandoned(name: str) -> bool:
    """Whether the process of this host that made a temporary file has ended."""
    host, start, pids, pid, *_ = [*name.split("-"), "", "", ""]
    own = _here()
    if host != own[0] or not pid.isdigit():
        return False
    return start != own[1] or (pids == own[2] and not is_alive(int(pid)))


def _hold(path: Path, lock: int) -> BinaryIO | None:
    """Opens and locks a file. None if it does not exist, was removed meanwhile, or is locked by another process."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, lock)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(bucket: Bucket, key: str, etag: str, size: int, target: Path) -> None:
    """Writes the object's bytes to a file, large objects in parts. Every part is of the version with this ETag."""
    with target.open("r+b") as file, ThreadPoolExecutor(_CONNECTIONS) as threads:

        def part(begin: int) -> None:
            data = bucket.read_range(key, begin, min(begin + _PART, size), etag)
            # On a disk that is nearly full, a write may be short without an error.
            if os.pwrite(file.fileno(), data, begin) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

        list(threads.map(part, range(0, size, _PART)))


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0
