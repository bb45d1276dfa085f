"""Paths that a task on any host can read and write: a `Path` on a disk that all hosts see, or a `StorePath`.

On one machine, and with a store that is a shared folder, every file has a `Path`, and nothing is copied. In a store
that is a bucket, a file has a `StorePath`. A reader gets a copy in the cache of its host (`file_cache.py`), or a range
of bytes. A writer gets a temporary file, which is uploaded before the `with` block ends. The functions of this module
take both kinds.

Names below one folder are written once. A rerun that writes a name again writes the same bytes.
"""

from __future__ import annotations

import fnmatch
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from moray.platform.core.atomic import whole_file
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.store.file_cache import FileCache
from moray.platform.store.manifest import FileEntry, hash_file
from moray.platform.store.object_reader import ObjectReader

if TYPE_CHECKING:
    from moray.platform.store.bucket import Bucket, Stored

_REQUESTS = 32  # at a time, for many small files
_INDEX_BLOCK = 1 << 16  # bytes; larger than the index of most files


@dataclass(frozen=True)
class StorePath:
    """An object, or a folder of objects. `root`: `s3://bucket/prefix`. `key`: the path below it, with slashes.

    Has the methods of `pathlib.Path` that the steps use. Errors are InputErrors that name the object.
    """

    root: str
    key: str

    def __str__(self) -> str:
        return f"{self.root}/{self.key}"

    def __truediv__(self, name: str | Path) -> StorePath:
        return StorePath(self.root, str(PurePosixPath(self.key, name)))

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> StorePath:
        return StorePath(self.root, str(PurePosixPath(self.key).parent))

    def with_name(self, name: str) -> StorePath:
        return self.parent / name

    def exists(self) -> bool:
        """Whether there is an object with this name. False for a folder."""
        return self.bucket.head(self.key) is not None

    def is_file(self) -> bool:
        return self.exists()

    def read_bytes(self) -> bytes:
        """The bytes of a small object. Raises FileNotFoundError."""
        data = self.bucket.get(self.key)
        if data is None:
            raise FileNotFoundError(f"{self} is missing")
        return data

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Writes a small object, without its SHA-256."""
        self.bucket.put(self.key, data)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object. A missing one is no error, whatever `missing_ok` is: S3 does not tell."""
        self.bucket.delete([self.key])

    @property
    def bucket(self) -> Bucket:
        return bucket_at(self.root, is_known=True)

    def described(self) -> Stored:
        """Size and ETag of the object. Raises InputError if it is missing."""
        found = self.bucket.head(self.key)
        if found is None:
            raise InputError(f"{self} is missing", "it was removed from the store; run again")
        return found


AnyPath: TypeAlias = Path | StorePath
T = TypeVar("T")
S = TypeVar("S")


def any_path(text: str) -> AnyPath:
    """The path with this text, as `str(path)` wrote it. The root of an `s3://` address is `MORAY_ARTIFACTS` or another
    known store, or else the folder that contains it."""
    if not text.startswith("s3://"):
        return Path(text)
    shared = os.environ.get("MORAY_ARTIFACTS", "").rstrip("/")
    roots = [root for root in (shared, *_variables) if root and text.startswith(f"{root}/")]
    root = max(roots, key=len, default=text.rpartition("/")[0])
    return StorePath(root, text.removeprefix(f"{root}/"))


def store_root(address: str) -> AnyPath:
    """The root of a store: a folder, or `s3://bucket/prefix`."""
    return StorePath(address, "") if address.startswith("s3://") else Path(address)


@contextmanager
def local_file(path: AnyPath) -> Iterator[Path]:
    """Yields the path of the file on this host, for the block. Maps and open files stay valid after it.

    An object is downloaded to this host's cache, once for all of the host's processes.
    """
    if isinstance(path, Path):
        yield path
        return
    found = path.described()
    with cache().file(path.bucket, path.key, found.etag, found.size) as local:
        yield local


@contextmanager
def local_folder(path: AnyPath) -> Iterator[Path]:
    """Yields a folder on this host with all files below `path`, for the block. For models and tokenizers."""
    if isinstance(path, Path):
        yield path
        return
    found = list(path.bucket.objects(f"{path.key}/"))
    if not found:
        raise InputError(f"{path} has no files", "it was removed from the store; run again")
    with cache().folder() as folder:

        def bring(item: Stored) -> None:
            target = folder / item.key.removeprefix(f"{path.key}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with cache().file(path.bucket, item.key, item.etag, item.size) as local:
                os.link(local, target)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(bring, found))
        yield folder


@contextmanager
def new_file(path: AnyPath) -> Iterator[Path]:
    """Yields the path of an empty temporary file, which the block writes and closes. After the block, the whole file
    has its name, on disk or in the store. If the block raises, nothing is written."""
    if isinstance(path, Path):
        with whole_file(path) as temporary:
            yield temporary
        return
    with cache().temporary() as temporary:
        yield temporary
        upload_file(temporary, path)


def upload_file(source: Path, path: StorePath) -> None:
    """Uploads a file of this host. Its SHA-256 is stored with it, for the manifest."""
    path.bucket.upload_file(source, path.key, hash_file(source))


def write_file(path: AnyPath, data: bytes) -> None:
    """Writes a whole file."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def read_range(path: AnyPath, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file. An object is not cached."""
    if isinstance(path, StorePath):
        return path.bucket.read_range(path.key, begin, end) if end > begin else b""
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def open_ranges(path: AnyPath) -> io.RawIOBase:
    """A file object for a format with an index. Of an object, it requests only the ranges that are read."""
    if isinstance(path, Path):
        return path.open("rb", buffering=0)
    found = path.described()
    return ObjectReader(path.bucket, path.key, found.size, found.etag, _INDEX_BLOCK)


def list_files(folder: AnyPath, pattern: str = "*") -> dict[str, int]:
    """Names and sizes in bytes of the files directly in a folder that match a pattern, in the order of names.

    Empty if the folder does not exist.
    """
    if isinstance(folder, Path):
        found = {path.name: path.stat().st_size for path in folder.glob(pattern) if path.is_file()}
    else:
        prefix = f"{folder.key}/"
        # A fixed beginning of the pattern limits what the server lists.
        fixed = pattern[: min((pattern.index(sign) for sign in "*?[" if sign in pattern), default=len(pattern))]
        listed = ((item.key.removeprefix(prefix), item.size) for item in folder.bucket.objects(prefix + fixed))
        found = {name: size for name, size in listed if "/" not in name and fnmatch.fnmatchcase(name, pattern)}
    return dict(sorted(found.items()))


def list_folders(folder: AnyPath) -> list[str]:
    """Names of the folders directly in a folder, sorted."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    return sorted(folder.bucket.folders(f"{folder.key}/"))


def in_threads(function: Callable[[T], S], items: Iterable[T], most: int = _REQUESTS) -> list[S]:
    """Applies a function that waits for files, for example `read_shard`, to `most` items at a time. Keeps the order."""
    with ThreadPoolExecutor(most) as threads:
        return list(threads.map(function, items))


def file_size(path: AnyPath) -> int:
    return path.stat().st_size if isinstance(path, Path) else path.described().size


def remove_folder(folder: AnyPath) -> None:
    """Removes a folder and everything below it. No error if it does not exist."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.bucket.delete([item.key for item in folder.bucket.objects(f"{folder.key}/")])


def entries_below(folder: StorePath, beginning: str = "") -> list[FileEntry]:
    """Path, size and SHA-256 of the objects below a folder whose paths start with `beginning`, sorted by path. An
    object that was written without its SHA-256 is read."""

    def entry(item: Stored) -> FileEntry:
        sha256 = folder.bucket.sha256(item.key)
        if not sha256:
            with local_file(StorePath(folder.root, item.key)) as local:
                sha256 = hash_file(local)
        return FileEntry(path=item.key.removeprefix(f"{folder.key}/"), size=item.size, sha256=sha256)

    with ThreadPoolExecutor(_REQUESTS) as threads:
        return sorted(threads.map(entry, folder.bucket.objects(f"{folder.key}/{beginning}")), key=lambda one: one.path)


@lru_cache(maxsize=64)
def bucket_at(url: str, is_known: bool = False) -> Bucket:
    """A bucket, or a folder in one. Cached, because its client holds connections. is_known: see `Bucket`."""
    from moray.platform.store.bucket import Bucket  # imports boto3, which is slow

    return Bucket(url, variables=store_variables(url), is_known=is_known)


def check_store(url: str) -> None:
    """Raises InputError, within seconds, if a store cannot be written: `s3://bucket/prefix`, or a folder."""
    if url.startswith("/"):
        if not os.access(url, os.W_OK):
            raise InputError(f"the store {url} is not a writable folder", "create it, or correct the path")
        return
    from moray.platform.store.bucket import Bucket

    Bucket(url, variables=store_variables(url)).check_writable()


def store_variables(url: str) -> Mapping[str, str] | None:
    """The AWS_... variables with which this process uses a store; None for those of the process."""
    return _variables.get(url)


_variables: dict[str, Mapping[str, str]] = {}  # by the URL of a store


def set_store_variables(url: str, variables: Mapping[str, str]) -> None:
    """Sets the AWS_... variables with which this process uses a store. Without them, those of the process apply."""
    if any(name.startswith("AWS_") for name in variables) and _variables.get(url) != variables:
        _variables[url] = dict(variables)
        bucket_at.cache_clear()


def cache() -> FileCache:
    """This host's cache, in `MORAY_HOME`."""
    home = Home.from_environment()
    return FileCache(home.cache / "files", home.cache_bytes)
