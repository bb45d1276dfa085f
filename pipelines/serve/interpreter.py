"""Garbage collection and threads of the interpreters that serve requests: proxies and replicas.

Full collections run only while few requests are open. A thread gives the GIL away sooner than by default, because an
event passes through three or four threads of each process.

Notable: a full collection looks at every object, and an open request has some 200 of them. With 1,000 open requests it
stops the process for 200 ms, and by default one follows the other within seconds. Ray Serve's proxies need them,
because each of their requests leaves 150 objects that refer to each other, and its body with them.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

_YOUNG, _MIDDLE, _NEVER = 10_000, 10, 1 << 30  # thresholds of `gc`
_SWITCH_SECONDS = 0.001  # until a thread gives the GIL to one that waits for it; 5 ms by default
_FEW = 16  # open requests
_CALM_SECONDS, _BUSY_SECONDS, _IDLE_SECONDS = 10.0, 120.0, 1.0


_lock = threading.Lock()
_before: list[tuple[tuple[int, int, int], float]] = []  # settings, once for each server


def tune_interpreter() -> None:
    """From now on full collections run only when they are called for, and threads switch soon."""
    gc.set_threshold(_YOUNG, _MIDDLE, _NEVER)
    sys.setswitchinterval(_SWITCH_SECONDS)


@contextmanager
def serving_interpreter() -> Iterator[None]:
    """`tune_interpreter` for one of a process's servers. The last one that ends restores what the first one found."""
    with _lock:
        _before.append(_before[-1] if _before else (gc.get_threshold(), sys.getswitchinterval()))
        tune_interpreter()
    try:
        yield
    finally:
        with _lock:
            thresholds, seconds = _before.pop()
            if not _before:
                gc.set_threshold(*thresholds)
                sys.setswitchinterval(seconds)


class CollectsWhenCalm:
    """ASGI middleware: a full collection when no request has been open for a second; every 10 s while few are; every
    two minutes while many are. clock: monotonic seconds."""

    def __init__(
        self,
        app: ASGIApp,
        collect: Callable[[], object] = gc.collect,
        clock: Callable[[], float] = time.monotonic,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self._app, self._collect, self._clock, self._idle_seconds = app, collect, clock, idle_seconds
        self._open, self._last, self._waiting = 0, clock(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            self._closed()

    def _closed(self) -> None:
        past = self._clock() - self._last
        if past > _BUSY_SECONDS or (past > _CALM_SECONDS and self._open <= _FEW):
            self._run()
        elif not self._open and not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().call_later(self._idle_seconds, self._idle)

    def _idle(self) -> None:
        self._waiting = False
        if not self._open:
            self._run()

    def _run(self) -> None:
        self._collect()
        self._last = self._clock()
