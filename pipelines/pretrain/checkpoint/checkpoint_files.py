"""Checkpoints as folders: which are whole, whether they are what was written, which may go.

    step-00000400/          whole: it was renamed when every rank was done
        __0_0.distcp ...    the tensors, by rank
        .metadata           what lies where; torch's
        checksums.json      size and SHA-256 of every other file; the last to be written
    .step-00000450/         in the making, or left by somebody who was killed
    damaged-step-00000350/  not what its checksums say; set aside when it was to be read

No torch and no ranks in here.
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


class Checksums(BaseModel):
    """`checksums.json`."""

    model_config = ConfigDict(frozen=True)

    files: list[FileEntry]


def whole(folder: Path) -> list[int]:
    """The steps of all whole checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def path_of(folder: Path, steps: int) -> Path:
    return folder / f"step-{steps:08d}"


def unfinished_path(folder: Path, steps: int) -> Path:
    return folder / f".step-{steps:08d}"


def prepare(folder: Path, steps: int) -> None:
    """Makes room for a checkpoint; what others left unfinished goes."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    unfinished_path(folder, steps).mkdir(parents=True)


def list_hashed_files(folder: Path, patterns: Iterable[str]) -> list[FileEntry]:
    """The files of a folder that match, with their checksums."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return [FileEntry(path=path.name, size=path.stat().st_size, sha256=hash_file(path)) for path in found]


def commit(folder: Path, steps: int, files: Sequence[FileEntry]) -> None:
    """Makes the unfinished checkpoint a whole one: in one step, and so that a power cut does not undo it."""
    listing = Checksums(files=list(files)).model_dump_json(indent=1) + "\n"
    write_text(unfinished_path(folder, steps) / CHECKSUMS, listing)
    publish(folder, steps)


def publish(folder: Path, steps: int) -> None:
    """Gives a checkpoint its name, all of whose files are there."""
    unfinished, final = unfinished_path(folder, steps), path_of(folder, steps)
    _sync(unfinished)
    unfinished.rename(final)
    _sync(folder)


def damage(folder: Path, steps: int, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a whole checkpoint, or "". Of n readers, (k, n) looks at every n-th file from k on."""
    path = path_of(folder, steps)
    try:
        files = Checksums.model_validate_json((path / CHECKSUMS).read_text()).files
    except (OSError, ValidationError) as error:
        return f"{CHECKSUMS} cannot be read: {type(error).__name__}"
    for entry in files[share[0] :: share[1]]:
        try:
            size = (path / entry.path).stat().st_size
            if size != entry.size:
                return f"{entry.path} has {size} bytes, {entry.size} were written"
            if hash_file(path / entry.path) != entry.sha256:
                return f"{entry.path} is not what was written (SHA-256)"
        except OSError as error:
            return f"{entry.path} cannot be read: {error.strerror}"
    return ""


def set_aside(folder: Path, steps: int) -> None:
    """Takes a damaged checkpoint out of the way; it is kept, for whoever wants to know."""
    path = path_of(folder, steps)
    aside = folder / f"damaged-{path.name}"
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def outdated(folder: Path, keep: int, hours: float | None, now: float | None = None) -> list[int]:
    """Whole checkpoints that retention does not want: all but the newest `keep`, and what is older than `hours`.

    Never the newest.
    """
    steps = whole(folder)
    limit = None if hours is None else (time.time() if now is None else now) - hours * 3600
    old = steps[:-keep]
    if limit is not None:
        old += [step for step in steps[-keep:-1] if path_of(folder, step).stat().st_mtime < limit]
    return old


def remove_checkpoint(folder: Path, steps: int) -> None:
    """Removes a whole checkpoint; one that is half gone is not taken for whole."""
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
