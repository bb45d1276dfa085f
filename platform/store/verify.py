"""Compares an artifact's files with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moray.platform.core.errors import InputError
from moray.platform.core.units import size
from moray.platform.store.manifest import FileEntry, Manifest, files_in, hash_file


@dataclass(frozen=True)
class Change:
    """A file that differs from the manifest, and how (for example "is missing")."""

    path: str
    problem: str


def changes(folder: Path, manifest: Manifest, hashes: bool, read: Callable[[int], None]) -> Iterator[Change]:
    """Yields the differences in an artifact's folder. Always compares sizes; compares contents only with `hashes`.

    read: called after each file with its size in bytes.
    """
    known = {entry.path for entry in manifest.files}
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda entry: _change(folder / entry.path, entry, hashes), manifest.files)
        for entry, change in zip(manifest.files, found, strict=True):
            if change:
                yield change
            read(entry.size)
    for path in sorted(files_in(folder)):
        if (name := str(path.relative_to(folder))) not in known:
            yield Change(name, "is not in the manifest")


def check_sizes(folder: Path, manifest: Manifest, shared: Callable[[], bool]) -> None:
    """Raises InputError if a file is missing or has another size. Called before a step reads the artifact.

    shared: whether a shared root has an intact copy. Files are checked in parallel, because an artifact may have
    100,000 files and each check may be a request to a file server.
    """
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda entry: _change(folder / entry.path, entry, hashes=False), manifest.files))
    for change in filter(None, found):
        reference = f"{manifest.step}/{manifest.fingerprint}"
        raise InputError(
            f"{folder / change.path} {change.problem}: artifact {reference} was changed after it was made",
            f"delete {folder}; it will be downloaded again"
            if shared()
            else f"moray artifacts rm {reference}, then run again",
        )


def _change(path: Path, entry: FileEntry, hashes: bool) -> Change | None:
    try:
        found = path.stat().st_size
        same = not hashes or found != entry.size or hash_file(path) == entry.sha256
    except FileNotFoundError:
        return Change(entry.path, "is missing")
    except OSError as error:
        return Change(entry.path, f"cannot be read: {error.strerror}")
    if found != entry.size:
        return Change(entry.path, f"has {size(found)} instead of {size(entry.size)}")
    return None if same else Change(entry.path, "has different contents")
