"""Answers on their way to coroutines: first tokens and ends at once, the rest in fewer and larger parts."""

from __future__ import annotations

import asyncio

import pytest

from moray.pipelines.serve import streams
from moray.pipelines.serve.sequence import Delta
from moray.pipelines.serve.streams import AnswerStream, Delivery, seconds_apart


def delta(text: str, end: bool = False) -> Delta:
    return Delta(text, generated=1, finish_reason="length" if end else None)


def test_events_are_further_apart_the_more_answers_are_open() -> None:
    assert [seconds_apart(answers) for answers in (0, 1, 4, 20, 100, 1000)] == [0.01, 0.01, 0.02, 0.04, 0.1, 0.25]


def test_what_is_neither_first_nor_last_waits_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(streams.time, "monotonic", lambda: now[0])

    async def scenario() -> None:
        stream, delivery = AnswerStream(), Delivery()

        async def sent() -> list[str]:
            assert delivery.send() == []
            await asyncio.sleep(0)
            items, stream._items = stream._items, []
            return [result.text for _, result in items if isinstance(result, Delta)]

        delivery.add(stream, (0, delta("first")))
        assert await sent() == ["first"]
        delivery.add(stream, (0, delta("a")))
        assert await sent() == []
        delivery.add(stream, (0, delta("b")))
        now[0] += 0.005
        assert await sent() == ["a", "b"]
        delivery.add(stream, (0, delta("c")))
        delivery.add(stream, (0, delta("d", end=True)))
        assert await sent() == ["c", "d"]
        delivery.add(stream, (1, RuntimeError("broken")))
        delivery.send()
        await asyncio.sleep(0)
        assert isinstance(stream._items[0][1], RuntimeError)
        assert await sent() == []

    asyncio.run(scenario())


def test_a_reader_gets_all_items_since_its_last_ones_and_an_end_without_waiting() -> None:
    async def scenario() -> None:
        stream = AnswerStream()
        stream.put([(0, delta("a"))])
        assert [index for index, _ in await stream.take(1000)] == [0]
        stream.put([(0, delta("b"))])
        taking = asyncio.ensure_future(stream.take(1000))
        await asyncio.sleep(0)
        assert not taking.done()  # a thousand seconds apart
        stream.put([(1, delta("c", end=True))])
        assert [index for index, _ in await taking] == [0, 1]

    asyncio.run(scenario())


def test_a_stream_whose_event_loop_is_closed_is_gone() -> None:
    async def scenario() -> AnswerStream:
        return AnswerStream()

    stream, delivery = asyncio.run(scenario()), Delivery()
    delivery.add(stream, (0, delta("a")))
    assert delivery.send() == [stream]
