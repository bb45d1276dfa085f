"""Which files a source takes of what lies below its place, and, with the reason, which it does not.

A folder is walked by name. Links to files are files. A link to a folder is entered where a pattern names it, never by
`**`, as in pathlib's patterns; so no loop of links is walked twice. Names that are no UTF-8 are kept as keys with the
odd bytes spelled out.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moray.pipelines.corpus.globs import matches, reaches
from moray.pipelines.corpus.source_file import File
from moray.platform.core.errors import InputError

# Why a file is not taken. The first three are what the recipe says; who looks at the others did not expect them.
NOT_INCLUDED, EXCLUDED, BEYOND = "not in `include`", "in `exclude`", "beyond `max_files`"
OTHER_SPLIT, NO_DATA = "of another split", "no data file of a dataset"
LOST_LINK, LINKED_FOLDER, SPECIAL = (
    "links that lead nowhere",
    "links to folders, not entered",
    "neither files nor folders",
)
EXPECTED = (NOT_INCLUDED, EXCLUDED, BEYOND, OTHER_SPLIT)
_SKIPPED = "__pycache__"  # never anything but what Python made of what lies beside it


@dataclass
class Listing:
    """files: (key, file), sorted. passed: of each reason how many were not taken; first: the key of one of them."""

    files: list[tuple[str, File]] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def leave(self, key: str, reason: str) -> None:
        self.passed[reason] += 1
        self.first.setdefault(reason, key)

    def told(self, expected: bool) -> str:
        """What was not taken, for people: also what the recipe leaves out, if `expected`."""
        reasons = [reason for reason in self.passed if expected or reason not in EXPECTED]
        return "; ".join(f"{self.passed[reason]} {reason} (such as {self.first[reason]})" for reason in reasons)


def list_folder(root: Path, include: Sequence[str], exclude: Sequence[str]) -> Listing:
    """Raises InputError for a folder that cannot be listed and is not excluded."""
    found = Listing()
    for key, entry in _walk(str(root), "", include, exclude, ()):
        if not any(matches(key, pattern) for pattern in include):
            if not _is_folder(entry):
                found.leave(key, NOT_INCLUDED)
            elif any(reaches(key, pattern, by_any=True) for pattern in include):
                found.leave(key, LINKED_FOLDER)
        elif any(matches(key, pattern) for pattern in exclude):
            found.leave(key, EXCLUDED)
        else:
            _take(found, key, entry)
    found.files.sort(key=lambda one: one[0])
    return found


def _take(found: Listing, key: str, entry: os.DirEntry[str]) -> None:
    try:
        status = entry.stat()
    except FileNotFoundError:
        if entry.is_symlink():
            found.leave(key, LOST_LINK)
        return  # else it went meanwhile
    except OSError:  # a folder that may be listed but not entered, or links in a loop: who reads it counts it
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        found.leave(key, LINKED_FOLDER if stat.S_ISDIR(status.st_mode) else SPECIAL)
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
    """Everything below but folders, which are entered. above: (device, inode) of the folders that this one lies in."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        status = os.stat(folder)
    except OSError as error:
        where = folder if key else f"{folder}, its place,"
        raise InputError(
            f"{where} cannot be listed: {error.strerror}", f"allow it, or add {f'{key}**/*'!r} to `exclude`"
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
        return not whole and any(reaches(key, pattern, by_any=True) for pattern in include)
    status = entry.stat()
    return (status.st_dev, status.st_ino) not in inside and any(reaches(key, pattern) for pattern in include)


def printable_name(name: str) -> str:
    r"""A name as UTF-8 can have it: a byte that is none is spelled `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
