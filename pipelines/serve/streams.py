"""The way of answers from the engine's thread to the coroutines that wait for them.

Notable: a small model takes a step in 0.2 ms, and each event of a stream takes 1 ms of the replica and 1 ms of Ray
Serve's proxy, whatever is in it; waking an event loop takes 20 us. So events of a stream are some milliseconds apart,
and so are wakes. The first token of an answer, its end, and an error are sent at once.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TypeAlias

from moray.pipelines.serve.sequence import Delta
from moray.pipelines.serve.sequence import Sequence as Answer

Item: TypeAlias = "tuple[int, Delta | Exception]"

# Seconds between the events of a stream, at least: 5 ms for each open answer up to 40 ms, with many of them 1 ms for
# each, since more than about 1,000 events per second would leave no time for anything else.
_EVENT_SECONDS, _LEAST_SECONDS, _MOST_SECONDS = 0.005, 0.01, 0.04
_MANY_SECONDS, _MOST_OF_MANY_SECONDS = 0.001, 0.25
_WAKE_SECONDS = 0.004  # between wakes of event loops


def seconds_apart(answers: int) -> float:
    """Between the events of a stream, at least, if so many answers are open."""
    few = min(max(_LEAST_SECONDS, _EVENT_SECONDS * answers), _MOST_SECONDS)
    return max(few, min(_MANY_SECONDS * answers, _MOST_OF_MANY_SECONDS))


def _ends(item: Item) -> bool:
    result = item[1]
    return isinstance(result, Exception) or result.finish_reason is not None


class AnswerStream:
    """The answers to one caller's requests, on that caller's event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.answers: list[Answer] = []
        self.begun = False  # whether anything has been sent; of the engine's thread
        self._items: list[Item] = []
        self._some, self._ended = asyncio.Event(), asyncio.Event()
        self._next = 0.0  # when the next items may be taken

    def put(self, items: list[Item]) -> None:
        self._items += items
        self._some.set()
        if any(map(_ends, items)):
            self._ended.set()

    async def take(self, apart: float) -> list[Item]:
        """All items received so far; waits for the first one, and until the last ones are so many seconds ago, unless
        an answer has ended."""
        await self._some.wait()
        if (left := self._next - self.loop.time()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), left)
        self._next = self.loop.time() + apart
        self._some.clear()
        self._ended.clear()
        items, self._items = self._items, []
        return items


class Delivery:
    """Sends items to streams. Used by the engine's thread."""

    def __init__(self) -> None:
        self._held: dict[AnswerStream, list[Item]] = {}
        self._urgent = False
        self._woken = 0.0

    def add(self, stream: AnswerStream, item: Item) -> None:
        self._held.setdefault(stream, []).append(item)
        self._urgent = self._urgent or not stream.begun or _ends(item)
        stream.begun = True

    def send(self) -> list[AnswerStream]:
        """Sends what was added, unless it can wait for the next step. Returns streams that nobody reads any more."""
        now = time.monotonic()
        if not self._held or not (self._urgent or now - self._woken >= _WAKE_SECONDS):
            return []
        held, self._held, self._urgent, self._woken = self._held, {}, False, now
        loops: dict[asyncio.AbstractEventLoop, dict[AnswerStream, list[Item]]] = {}
        for stream, items in held.items():
            loops.setdefault(stream.loop, {})[stream] = items
        gone: list[AnswerStream] = []
        for loop, streams in loops.items():
            try:
                loop.call_soon_threadsafe(_put_all, streams)
            except RuntimeError:  # the event loop is closed
                gone += streams
        return gone


def _put_all(streams: dict[AnswerStream, list[Item]]) -> None:
    for stream, items in streams.items():
        stream.put(items)
