"""State as server-sent events: looked at about once a second while somebody listens, told to all when it changed.

However many clients there are, one task takes the snapshots, each in a thread. A client holds no queue, only the
version it has seen: one that reads slowly skips what it was too late for and gets the newest.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from typing import Any

SECONDS = 1.0  # between two looks
KEEPALIVE_SECONDS = 15.0  # proxies close what is silent for longer
_LOG = logging.getLogger(__name__)

Snapshot = Callable[[], Mapping[str, Any]]


class Streams:
    """The streams of one server. All of it happens on its event loop; only snapshots are taken in threads.

    `stopping` says that the server is about to end: it waits for open answers, so they end within a second.
    """

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping
        self._feeds: dict[Hashable, _Feed] = {}

    async def listen(self, key: Hashable, event: str, snapshot: Snapshot) -> AsyncIterator[bytes]:
        """The bytes of a stream for one client. Clients with the same `key` share the snapshots of the first."""
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = _Feed(event, snapshot, self._stopping)
        feed.clients += 1
        try:
            async for chunk in feed.chunks():
                yield chunk
        finally:
            feed.clients -= 1
            if not feed.clients:
                feed.task.cancel()
                if self._feeds.get(key) is feed:
                    del self._feeds[key]


class _Feed:
    """One snapshot and its versions."""

    def __init__(self, event: str, snapshot: Snapshot, stopping: Callable[[], bool]) -> None:
        self.clients = 0
        self._event = event
        self._snapshot = snapshot
        self._stopping = stopping
        self._version = 0
        self._chunk = b""
        self._told: Any = None  # what the chunk says, without the time of day
        self._over = False
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._watch())

    async def chunks(self) -> AsyncIterator[bytes]:
        seen = 0
        while True:
            news = self._news
            if self._version != seen:
                seen = self._version
                yield self._chunk
                continue
            if self._over:
                return
            try:
                await asyncio.wait_for(news.wait(), KEEPALIVE_SECONDS)
            except TimeoutError:
                yield b": still here\n\n"

    async def _watch(self) -> None:
        while not self._stopping():
            try:
                await self._look()
            except Exception:  # a look that failed is said in the log; the next one may succeed
                _LOG.exception("no snapshot for the stream of %s", self._event)
            await asyncio.sleep(SECONDS)
        self._over = True
        self._tell()

    async def _look(self) -> None:
        found = await asyncio.to_thread(self._snapshot)
        told = {name: value for name, value in found.items() if name != "now"}
        if told == self._told:
            return
        text = json.dumps(found, allow_nan=False, separators=(",", ":"))
        self._told, self._chunk = told, f"event: {self._event}\ndata: {text}\n\n".encode()
        self._version += 1
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
