"""Work in a folder of its own, for a while, in a process that does other things meanwhile.

The current folder belongs to a whole process, but on Linux a thread can have its own. So recipes of several clients are
checked at once, each in the folder it came from, and one whose folder is on a file system that hangs holds up no other.
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
_whole_process = threading.Lock()  # elsewhere: one at a time
T = TypeVar("T")


def in_folder(folder: Path, work: Callable[[], T], seconds: float) -> T:
    """The result of `work`, done with `folder` as the current one. Raises what it raises, and InputError if it takes
    more than `seconds`; then it is left to itself."""
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
            f"checking the recipe took more than {seconds:.0f} s", f"does the file system of {folder} answer?"
        )
    return results[0]


@contextlib.contextmanager
def _current(folder: Path) -> Iterator[None]:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_FS) == 0:
        os.chdir(folder)  # of this thread alone, which ends with it
        yield
        return
    with _whole_process, contextlib.chdir(folder):
        yield
