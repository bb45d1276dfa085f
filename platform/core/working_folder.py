"""Runs a function with its own current folder, without changing the current folder of the process.

The current folder belongs to the whole process, but on Linux a thread can have its own. So the control plane checks
recipes of several clients concurrently, each in its own folder, and a hanging file system delays only its own recipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from moray.platform.core.errors import InputError

_CLONE_FS = 0x200
_whole_process = threading.Lock()  # used on systems other than Linux: one folder at a time
T = TypeVar("T")


def in_folder(folder: Path, work: Callable[[], T], seconds: float) -> T:
    """Returns the result of `work`, called with `folder` as current folder. Re-raises its exceptions. Raises InputError
    after `seconds`; the thread is then abandoned."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with _current(folder):
                results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="in folder", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise InputError(
            f"checking the recipe took more than {seconds:.0f} s", f"check that the file system of {folder} responds"
        )
    return results[0]


@contextlib.contextmanager
def _current(folder: Path) -> Iterator[None]:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_FS) == 0:
        os.chdir(folder)  # affects only this thread, which ends with it
        yield
        return
    with _whole_process, contextlib.chdir(folder):
        yield
