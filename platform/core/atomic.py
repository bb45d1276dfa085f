"""Atomic file writes: write to a temporary file in the same folder, sync, then rename.

Every file that a rerun treats as finished work is written through this module. The data is synced before the rename,
because after a power failure a file system may keep the rename and lose the data. Losing the rename is harmless: the
work is only done again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the path of an empty temporary file in the folder of `path`, which the block writes and closes. On exit
    the file is synced and replaces `path`. If the block raises, it is removed and `path` is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Atomically replaces the contents of `path`; after a crash, `path` is either the old file or the new one."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def create_bytes(path: Path, data: bytes) -> bool:
    """Like `write_bytes`, but the first writer wins: returns False and changes nothing if `path` exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def is_full(error: OSError) -> bool:
    """Whether the error means that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Writes a file's data to the disk, so that a rename after it cannot outlive them in a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
