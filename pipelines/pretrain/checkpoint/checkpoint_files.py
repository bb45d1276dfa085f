"""Checkpoint folders on disk: listing, commit, verification and retention.

    step-00000400/          complete: renamed when every rank was done
        __0_0.distcp ...    the tensors, by rank
        .metadata           torch's index of the tensors
        checksums.json      size and SHA-256 of every other file; written last
    .step-00000450/         being written, or left by a killed process
    damaged-step-00000350/  failed verification when it was read, and was set aside

This module uses neither torch nor ranks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moray.platform.core.atomic import write_text
from moray.platform.store.manifest import FileEntry, hash_file

CHECKSUMS = "checksums.json"
INDEX = ".metadata"  # torch's name


class Checksums(BaseModel):
    """Contents of `checksums.json`."""

    model_config = ConfigDict(frozen=True)

    files: list[FileEntry]


def complete_steps(folder: Path) -> list[int]:
    """The steps of all complete checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def path_of(folder: Path, steps: int) -> Path:
    return folder / f"step-{steps:08d}"


def unfinished_path(folder: Path, steps: int) -> Path:
    return folder / f".step-{steps:08d}"


def prepare(folder: Path, steps: int) -> None:
    """Creates the folder of an unfinished checkpoint, and removes other unfinished ones."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    unfinished_path(folder, steps).mkdir(parents=True)


def list_hashed_files(folder: Path, patterns: Iterable[str]) -> list[FileEntry]:
    """The files of a folder that match a pattern, with their checksums."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return [FileEntry(path=path.name, size=path.stat().st_size, sha256=hash_file(path)) for path in found]


def commit(folder: Path, steps: int, files: Sequence[FileEntry]) -> None:
    """Makes the unfinished checkpoint a complete one, atomically and durably (it survives a power cut)."""
    listing = Checksums(files=list(files)).model_dump_json(indent=1) + "\n"
    write_text(unfinished_path(folder, steps) / CHECKSUMS, listing)
    publish(folder, steps)


def publish(folder: Path, steps: int) -> None:
    """Renames an unfinished checkpoint, which has all its files, to its final name."""
    unfinished, final = unfinished_path(folder, steps), path_of(folder, steps)
    _sync(unfinished)
    unfinished.rename(final)
    _sync(folder)


def find_damage(folder: Path, steps: int, share: tuple[int, int] = (0, 1)) -> str:
    """Description of damage to a complete checkpoint, or "". share: (k, n) checks every n-th file, starting with k."""
    path = path_of(folder, steps)
    try:
        files = Checksums.model_validate_json((path / CHECKSUMS).read_text()).files
    except (OSError, ValidationError) as error:
        return f"cannot read {CHECKSUMS}: {type(error).__name__}"
    for entry in files[share[0] :: share[1]]:
        try:
            size = (path / entry.path).stat().st_size
            if size != entry.size:
                return f"{entry.path} has {size} bytes instead of {entry.size}"
            if hash_file(path / entry.path) != entry.sha256:
                return f"the SHA-256 of {entry.path} does not match {CHECKSUMS}"
        except OSError as error:
            return f"cannot read {entry.path}: {error.strerror}"
    return ""


def set_aside(folder: Path, steps: int) -> None:
    """Renames a damaged or discarded checkpoint, so that it is no longer used but can be inspected."""
    path = path_of(folder, steps)
    aside = folder / f"damaged-{path.name}"
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def outdated(folder: Path, keep: int, hours: float | None, now: float | None = None) -> list[int]:
    """Complete checkpoints that retention removes: all but the newest `keep`, and those older than `hours`.

    The newest is always kept.
    """
    steps = complete_steps(folder)
    limit = None if hours is None else (time.time() if now is None else now) - hours * 3600
    old = steps[:-keep]
    if limit is not None:
        old += [step for step in steps[-keep:-1] if path_of(folder, step).stat().st_mtime < limit]
    return old


def remove_checkpoint(folder: Path, steps: int) -> None:
    """Removes a complete checkpoint. It is renamed first, so that a partly removed one does not count as complete."""
    leaving = folder / f".leaving-{path_of(folder, steps).name}"
    with contextlib.suppress(FileNotFoundError):
        path_of(folder, steps).rename(leaving)
    for old in folder.glob(".leaving-*"):
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
