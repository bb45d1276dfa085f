"""Files that are there whole or not at all: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step; a crash leaves the old file or the new one."""
    temporary = _write_beside(path, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def create_bytes(path: Path, data: bytes) -> bool:
    """Like `write_bytes`, but the first writer wins: returns False, changing nothing, if `path` exists."""
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def is_full(error: OSError) -> bool:
    """Whether this is the error of a disk, or a quota, without room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _write_beside(path: Path, data: bytes) -> Path:
    """`data` on disk, synced, under a temporary name in the folder of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)
