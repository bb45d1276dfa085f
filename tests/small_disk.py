"""A real file system in memory that a test can let run full and make roomy again. Only root may mount it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOMY = "800m"  # a run asks for 512 MiB before it starts


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mounts a tmpfs on `folder`; skips the test where that is not allowed."""
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={ROOMY}", "moray-test", folder)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs takes rights that are not given here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leaves no room but what is left of a page here and there, by shrinking the disk to what it holds."""
    deadline = time.monotonic() + 60
    while not _shrink(disk):
        assert time.monotonic() < deadline, "somebody keeps writing"


def empty(disk: Path) -> None:
    """Makes room again."""
    _mount("-o", f"remount,size={ROOMY}", disk)


def _shrink(disk: Path) -> bool:
    """False if more was written between looking and shrinking."""
    space = os.statvfs(disk)
    used = max(1, space.f_blocks - space.f_bfree) * space.f_frsize  # size=0 would lift the limit
    try:
        _mount("-o", f"remount,size={used}", disk)
    except subprocess.CalledProcessError:
        return False
    return True


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)
