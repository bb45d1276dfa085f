"""Files that are there whole or not at all: written beside their place, synced, then renamed.

Every file that a rerun takes for finished work is written through here. It is synced before it gets its name, because a
file system may keep a rename and lose the data after a power failure; a name that is lost is only work to be done
again.
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
    """Gives the path of an empty file in the folder of `path`, which the block writes and closes. Then it is synced and
    replaces `path`; if the block raises, it is removed and `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step; a crash leaves the old file or the new one."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def create_bytes(path: Path, data: bytes) -> bool:
    """Like `write_bytes`, but the first writer wins: returns False, changing nothing, if `path` exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def is_full(error: OSError) -> bool:
    """Whether this is the error of a disk, or a quota, without room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
