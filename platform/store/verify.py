"""Whether an artifact's files are still those that its manifest names."""

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
    """A file that is not as the manifest says: what, in words."""

    path: str
    what: str


def changes(folder: Path, manifest: Manifest, hashes: bool, read: Callable[[int], None]) -> Iterator[Change]:
    """What differs in an artifact's folder. Sizes are always compared, contents only with `hashes`.

    read: is told how many bytes were looked at, file by file.
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
    """Raises InputError for a file that is missing or of another size: a step is about to read it.

    shared: says whether the artifact also lies whole in a shared root. Files are asked for many at once:
    an artifact may have 100,000, each a question to a file server.
    """
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda entry: _change(folder / entry.path, entry, hashes=False), manifest.files))
    for change in filter(None, found):
        reference = f"{manifest.step}/{manifest.fingerprint}"
        raise InputError(
            f"{folder / change.path} {change.what}: artifact {reference} was changed since it was made",
            f"delete {folder}: it is fetched again" if shared() else f"moray artifacts rm {reference}, then run again",
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
        return Change(entry.path, f"has {size(found)} of {size(entry.size)}")
    return None if same else Change(entry.path, "has other contents")
