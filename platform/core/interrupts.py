"""Ctrl-C and SIGTERM, alike: both end in KeyboardInterrupt, so that `finally` blocks run and nothing is left behind.

The handlers are set explicitly because a process started in the background of a shell script has SIGINT ignored, and
Python then leaves it so.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def until_interrupted(notice: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While this lasts, SIGINT and SIGTERM call `notice` and raise KeyboardInterrupt in the main thread.

    In another thread it does nothing: signals then belong to whoever embeds us.
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


_handled: list[bool] = []  # one for each `until_interrupted` that lasts


def interrupt() -> None:
    """Raises KeyboardInterrupt in the main thread, from another one, while `until_interrupted` lasts there."""
    if _handled:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
