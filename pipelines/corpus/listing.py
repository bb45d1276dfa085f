"""Lists the files of a source, and counts the skipped files with the reason.

A folder is walked in the order of names. Links to files are followed. A link to a folder is followed only if a pattern
names it, never for `**`, as in pathlib, so that no loop of links is walked twice. In keys of names that are not UTF-8,
the invalid bytes are escaped.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moray.pipelines.corpus.globs import matches, may_match_below
from moray.pipelines.corpus.source_file import File
from moray.platform.core.errors import InputError

# Reasons to skip a file, which are keys of the step's counts. The recipe causes those in EXPECTED; the others cause a
# warning.
NOT_INCLUDED, EXCLUDED, BEYOND = "not in `include`", "in `exclude`", "beyond `max_files`"
OTHER_SPLIT, NO_DATA = "of another split", "no data file of a dataset"
LOST_LINK, LINKED_FOLDER, SPECIAL = (
    "links that lead nowhere",
    "links to folders, not entered",
    "neither files nor folders",
)
EXPECTED = (NOT_INCLUDED, EXCLUDED, BEYOND, OTHER_SPLIT)
_SKIPPED = "__pycache__"  # compiled copies of the modules beside it


@dataclass
class Listing:
    """files: (key, file), sorted. skipped: number of skipped files by reason. first: an example key for each reason."""

    files: list[tuple[str, File]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def skip(self, key: str, reason: str) -> None:
        self.skipped[reason] += 1
        self.first.setdefault(reason, key)

    def summary(self, expected: bool) -> str:
        """The skipped files in one line. expected: include those that the recipe excludes."""
        reasons = [reason for reason in self.skipped if expected or reason not in EXPECTED]
        return "; ".join(f"{self.skipped[reason]} {reason} (such as {self.first[reason]})" for reason in reasons)


def list_folder(root: Path, include: Sequence[str], exclude: Sequence[str]) -> Listing:
    """The files of a folder. Raises InputError for a folder that cannot be listed and is not excluded."""
    found = Listing()
    for key, entry in _walk(str(root), "", include, exclude, ()):
        if not any(matches(key, pattern) for pattern in include):
            if not _is_folder(entry):
                found.skip(key, NOT_INCLUDED)
            elif any(may_match_below(key, pattern, by_any=True) for pattern in include):
                found.skip(key, LINKED_FOLDER)
        elif any(matches(key, pattern) for pattern in exclude):
            found.skip(key, EXCLUDED)
        else:
            _take(found, key, entry)
    found.files.sort(key=lambda one: one[0])
    return found


def _take(found: Listing, key: str, entry: os.DirEntry[str]) -> None:
    try:
        status = entry.stat()
    except FileNotFoundError:
        if entry.is_symlink():
            found.skip(key, LOST_LINK)
        return  # else the file was deleted meanwhile
    except OSError:  # the folder can be listed but not entered, or links form a loop: the reader counts the file
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        found.skip(key, LINKED_FOLDER if stat.S_ISDIR(status.st_mode) else SPECIAL)
        return
    found.files.append((key, File(entry.path, status.st_size if status else 0)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _walk(
    folder: str, key: str, include: Sequence[str], exclude: Sequence[str], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All entries below, except the folders that are entered. above: (device, inode) of all parent folders."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        status = os.stat(folder)
    except OSError as error:
        where = folder if key else f"{folder}, the source's location,"
        raise InputError(
            f"{where} cannot be listed: {error.strerror}", f"grant read access, or add {f'{key}**/*'!r} to `exclude`"
        ) from error
    inside = (*above, (status.st_dev, status.st_ino))
    for entry in listed:
        name = key + printable_name(entry.name)
        if _enters(entry, name, include, exclude, inside):
            yield from _walk(entry.path, f"{name}/", include, exclude, inside)
        elif not (_is_folder(entry) and not entry.is_symlink()):
            yield name, entry


def _enters(
    entry: os.DirEntry[str],
    key: str,
    include: Sequence[str],
    exclude: Sequence[str],
    inside: tuple[tuple[int, int], ...],
) -> bool:
    if not _is_folder(entry) or entry.name == _SKIPPED:
        return False
    if not entry.is_symlink():
        whole = any(pattern.endswith("**/*") and matches(f"{key}/x", pattern) for pattern in exclude)
        return not whole and any(may_match_below(key, pattern, by_any=True) for pattern in include)
    status = entry.stat()
    return (status.st_dev, status.st_ino) not in inside and any(may_match_below(key, pattern) for pattern in include)


def printable_name(name: str) -> str:
    r"""The name as valid UTF-8. An invalid byte is escaped as `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
