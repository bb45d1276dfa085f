from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from moray.platform.server import streams
from moray.platform.server.streams import Streams


class Server:
    """What a stream shows, and whether the server is about to end."""

    def __init__(self) -> None:
        self.state: Any = {"now": 1, "value": 1}
        self.ending = False
        self.looks = 0
        self.streams = Streams(lambda: self.ending)

    def look(self) -> dict[str, Any]:
        self.looks += 1
        if isinstance(self.state, Exception):
            raise self.state
        return dict(self.state)

    def listen(self) -> AsyncIterator[bytes]:
        return self.streams.listen("key", "overview", self.look)

    async def looked_again(self) -> None:
        """Waits for a look that began after this call."""
        seen = self.looks
        while self.looks < seen + 2:
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SECONDS", 0.001)


def test_only_changes_are_sent_and_the_time_is_no_change() -> None:
    async def run() -> None:
        server = Server()
        heard = server.listen()
        assert await anext(heard) == b'event: overview\ndata: {"now":1,"value":1}\n\n'
        server.state = {"now": 2, "value": 1}
        await server.looked_again()
        server.state = {"now": 3, "value": 2}
        assert await anext(heard) == b'event: overview\ndata: {"now":3,"value":2}\n\n'

    asyncio.run(run())


def test_clients_share_polls_and_a_late_one_gets_the_state_at_once() -> None:
    async def run() -> None:
        server = Server()
        first, second = server.listen(), server.listen()
        told = await anext(first)
        assert await anext(second) == told
        assert len(server.streams._feeds) == 1

    asyncio.run(run())


def test_a_slow_client_gets_the_newest_state() -> None:
    async def run() -> None:
        server = Server()
        slow, quick = server.listen(), server.listen()
        await anext(slow)
        await anext(quick)
        for value in (2, 3, 4):
            server.state = {"value": value}
            assert b"%d" % value in await anext(quick)
        assert b'"value":4' in await anext(slow)

    asyncio.run(run())


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEPALIVE_SECONDS", 0.001)

    async def run() -> None:
        heard = Server().listen()
        first = [await anext(heard) for _ in range(20)]
        assert b": keepalive\n\n" in first
        assert first.count(b'event: overview\ndata: {"now":1,"value":1}\n\n') == 1

    asyncio.run(run())


def test_streams_end_with_the_server() -> None:
    async def run() -> None:
        server = Server()
        heard = server.listen()
        await anext(heard)
        server.ending = True
        assert [chunk async for chunk in heard] == []
        assert not server.streams._feeds

    asyncio.run(run())


def test_without_listeners_there_are_no_polls() -> None:
    async def run() -> None:
        server = Server()
        heard = server.listen()
        await anext(heard)
        await heard.aclose()  # type: ignore[attr-defined]
        assert not server.streams._feeds
        assert not [
            task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.cancelling()
        ]

    asyncio.run(run())


def test_a_look_that_fails_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        server = Server()
        server.state = OSError("the disk is away")
        heard = server.listen()
        waiting = asyncio.ensure_future(anext(heard))  # type: ignore[arg-type]
        await server.looked_again()
        server.state = {"value": 1}
        assert b'"value":1' in await waiting

    asyncio.run(run())
    assert "the disk is away" in caplog.text
