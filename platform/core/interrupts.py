"""Turns both SIGINT (Ctrl-C) and SIGTERM into KeyboardInterrupt, so that `finally` blocks run and clean up.

The handlers are set explicitly because a shell script starts background processes with SIGINT ignored, and Python then
keeps it ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def until_interrupted(notice: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the block, SIGINT and SIGTERM call `notice` and raise KeyboardInterrupt in the main thread.

    Does nothing in another thread: the embedding program then handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        notice()
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    _handled.append(True)
    try:
        yield
    finally:
        _handled.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM that arrive inside the block are handled at its end. For native code that an exception in its
    midst would leave in a state in which the process ends with a segmentation fault."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for first in arrived[:1]:
            signal.raise_signal(first)


_handled: list[bool] = []  # one for each active `until_interrupted`


def interrupt() -> None:
    """Raises KeyboardInterrupt in the main thread, from another thread, if `until_interrupted` is active there."""
    if _handled:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
