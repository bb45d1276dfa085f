"""The submitter's own files in the store, for hosts that do not have them.

<store>/.sources/ab/<sha256>/<name>     a file, by its contents: uploaded once, however many recipes use it
<store>/.sources/trees/<id>.json        a file or folder: the key, size and SHA-256 of each of its files
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.store.manifest import hash_file
from moray.platform.store.paths import AnyPath, any_path, in_threads, local_file, new_file, write_file

SOURCES = ".sources"
_UPLOADS = 8  # at a time
Progress = Callable[[str, float, float], None]  # phase, bytes done, total bytes


@dataclass(frozen=True)
class SubmittedFile:
    """One file of a tree. key: its path below the tree. place: its contents."""

    key: str
    size: int
    sha256: str
    place: AnyPath


def upload_tree(store: AnyPath, files: Mapping[str, Path], progress: Progress) -> AnyPath:
    """Uploads files, given by key, that the store does not have yet. Returns the address of their tree.

    Raises InputError for a file that cannot be read.
    """
    sizes = {key: _size(path) for key, path in files.items()}
    total, done = float(sum(sizes.values())), 0.0
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(4) as threads:
        for key, sha256 in zip(files, threads.map(_hash, files.values()), strict=True):
            hashes[key] = sha256
            done += sizes[key]
            progress("hashing", done, total)
    places = {
        key: _place(store, sha256, path.name)
        for (key, path), sha256 in zip(files.items(), hashes.values(), strict=True)
    }
    known = in_threads(lambda place: place.exists(), places.values())
    missing = [key for key, is_known in zip(places, known, strict=True) if not is_known]
    done = total - float(sum(sizes[key] for key in missing))
    with ThreadPoolExecutor(_UPLOADS) as threads:
        for key, _ in zip(
            missing, threads.map(lambda key: _upload(files[key], places[key], hashes[key]), missing), strict=True
        ):
            done += sizes[key]
            progress("uploading", done, total)
    rows = [[key, sizes[key], hashes[key], files[key].name] for key in files]
    text = json.dumps(rows).encode()
    tree = store / SOURCES / "trees" / f"{hashlib.sha256(text).hexdigest()[:32]}.json"
    if not tree.exists():
        write_file(tree, text)
    return tree


def read_tree(address: str) -> list[SubmittedFile]:
    """The files of a tree, in the order of the upload. Raises InputError if it is gone."""
    tree = any_path(address)
    store = tree.parent.parent.parent
    try:
        rows = json.loads(tree.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{address} no longer exists", "submit the recipe again") from None
    return [SubmittedFile(key, size, sha256, _place(store, sha256, name)) for key, size, sha256, name in rows]


def bring_tree(address: str) -> Path:
    """Brings a tree to this host: returns the path of its folder or, if it is a single file, of that file."""
    files = read_tree(address)
    folder = Home.from_environment().root / "submitted" / PurePosixPath(address).stem
    for file in files:
        target = folder / file.key
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with local_file(file.place) as local, new_file(target) as temporary:
                _link(local, temporary)
    return folder / files[0].key if len(files) == 1 and files[0].key == files[0].place.name else folder


def files_below(path: Path) -> dict[str, Path]:
    """A file, or all files of a folder, by key."""
    if path.is_file():
        return {path.name: path}
    found = sorted(one for one in path.rglob("*") if one.is_file())
    return {one.relative_to(path).as_posix(): one for one in found}


def total_size(trees: Sequence[Mapping[str, Path]]) -> int:
    """Bytes of all files."""
    return sum(_size(path) for files in trees for path in files.values())


def _place(store: AnyPath, sha256: str, name: str) -> AnyPath:
    return store / SOURCES / sha256[:2] / sha256 / name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "grant read access, or exclude it") from error


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "grant read access, or exclude it") from error


def _upload(source: Path, place: AnyPath, sha256: str) -> None:
    """Uploads a file to the place of its contents. Raises InputError if it has changed since it was hashed."""
    changed = InputError(f"{source} changed while it was uploaded", "submit again when nothing writes to it")
    if isinstance(place, Path):
        with new_file(place) as temporary:
            shutil.copyfile(source, temporary)
            if hash_file(temporary) != sha256:
                raise changed
        return
    if hash_file(source) != sha256:
        raise changed
    place.bucket.upload_file(source, place.key, sha256)
    if hash_file(source) != sha256:  # of a large object, the server checks only the parts
        place.unlink()
        raise changed


def _link(source: Path, target: Path) -> None:
    """Makes `target`, an existing empty file, the same as `source`: a link, or a copy on another disk."""
    target.unlink()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
