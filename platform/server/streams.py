"""Server-sent events: state is polled about once a second while there are clients, and sent to all when it changes.

One task takes the snapshots for all clients, each snapshot in a thread. A client has no queue, only the version it has
seen. A slow client skips intermediate versions and receives the newest.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from typing import Any

SECONDS = 1.0  # between two snapshots
KEEPALIVE_SECONDS = 15.0  # proxies close connections that are silent for longer
_LOG = logging.getLogger(__name__)

Snapshot = Callable[[], Mapping[str, Any]]


class Streams:
    """The streams of one server. Everything except the snapshots runs on its event loop.

    stopping: whether the server is shutting down. Streams then end within a second, because a shutdown waits for open
    responses.
    """

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping
        self._feeds: dict[Hashable, _Feed] = {}

    async def listen(self, key: Hashable, event: str, snapshot: Snapshot) -> AsyncIterator[bytes]:
        """Yields the bytes of a stream for one client. Clients with the same `key` share snapshots."""
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
    """Polls one snapshot and holds its newest version."""

    def __init__(self, event: str, snapshot: Snapshot, stopping: Callable[[], bool]) -> None:
        self.clients = 0
        self._event = event
        self._snapshot = snapshot
        self._stopping = stopping
        self._version = 0
        self._chunk = b""
        self._sent: Any = None  # the state in the chunk, without the time of day
        self._over = False
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._poll())

    async def chunks(self) -> AsyncIterator[bytes]:
        seen = 0
        while True:
            changed = self._changed
            if self._version != seen:
                seen = self._version
                yield self._chunk
                continue
            if self._over:
                return
            try:
                await asyncio.wait_for(changed.wait(), KEEPALIVE_SECONDS)
            except TimeoutError:
                yield b": keepalive\n\n"

    async def _poll(self) -> None:
        while not self._stopping():
            try:
                await self._update()
            except Exception:  # logged; the next snapshot may succeed
                _LOG.exception("snapshot for the stream of %s failed", self._event)
            await asyncio.sleep(SECONDS)
        self._over = True
        self._notify()

    async def _update(self) -> None:
        state = await asyncio.to_thread(self._snapshot)
        content = {name: value for name, value in state.items() if name != "now"}
        if content == self._sent:
            return
        text = json.dumps(state, allow_nan=False, separators=(",", ":"))
        self._sent, self._chunk = content, f"event: {self._event}\ndata: {text}\n\n".encode()
        self._version += 1
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
