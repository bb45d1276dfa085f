"""Whether an artifact's files are still those that its manifest names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moray.platform.errors import InputError
from moray.platform.manifest import FileEntry, Manifest, files_in, hash_file
from moray.platform.units import size


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
    for entry in manifest.files:
        if change := _change(folder / entry.path, entry, hashes):
            yield change
        read(entry.size)
    for path in sorted(files_in(folder)):
        if (name := str(path.relative_to(folder))) not in known:
            yield Change(name, "is not in the manifest")


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises InputError at the first file that is missing or of another size: a step is about to read it."""
    for entry in manifest.files:
        if change := _change(folder / entry.path, entry, hashes=False):
            reference = f"{manifest.step}/{manifest.fingerprint}"
            raise InputError(
                f"{folder / change.path} {change.what}: artifact {reference} was changed since it was made",
                f"`moray artifacts rm {reference}` removes it; then run again",
            )


def _change(path: Path, entry: FileEntry, hashes: bool) -> Change | None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return Change(entry.path, "is missing")
    except OSError as error:
        return Change(entry.path, f"cannot be read: {error.strerror}")
    if found != entry.size:
        return Change(entry.path, f"has {size(found)} of {size(entry.size)}")
    if hashes and hash_file(path) != entry.sha256:
        return Change(entry.path, "has other contents")
    return None
