"""Requests that are too much, each beside a stream that goes on. `benchmarks/serving_http.py` measures its gaps."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from typing import Any

import aiohttp
import pytest

from tests.pipelines.serve.test_openai_client import wait_until_idle

CONTEXT = 256
SERIAL = count()  # so that no prompt is in the cache


async def stream(client: aiohttp.ClientSession, prompt: str = "In the beginning", tokens: int = 100) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.post("/v1/completions", json=body) as response:
        assert response.status == 200
        events = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def status(client: aiohttp.ClientSession, content: Any) -> int:
    """The status of a request; 413 too if the server closes the connection, because it reads no more of the body."""
    headers = {"content-type": "application/json"}
    try:
        async with client.post("/v1/completions", data=content, headers=headers) as response:
            return response.status
    except aiohttp.ClientConnectionError:
        return 413


async def chunks() -> AsyncIterator[bytes]:
    yield b'{"prompt": "'
    for _ in range(100):
        yield b"x" * 1_000_000


def body(prompt: Any, **fields: Any) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": 4, **fields}).encode()


async def long_answers(client: aiohttp.ClientSession) -> int:
    """66 of them, then a short one, which must not wait for all of them."""
    tasks = [asyncio.create_task(stream(client, f"{next(SERIAL)}", 100)) for _ in range(66)]
    await asyncio.sleep(0)  # they are sent first
    answered = await status(client, body("In"))
    assert not all(task.done() for task in tasks)
    await asyncio.gather(*tasks)
    return answered


ATTACKS: dict[str, tuple[Callable[[aiohttp.ClientSession], Awaitable[int]], int]] = {
    "a body of 100 MB": (lambda client: status(client, b'{"prompt": "' + b"x" * 100_000_000), 413),
    "a body of 100 MB in chunks": (lambda client: status(client, chunks()), 413),
    "5 million ids": (lambda client: status(client, body([5] * 5_000_000)), 413),
    "10,000 prompts": (lambda client: status(client, body(["x"] * 10_000)), 400),
    "a body of open brackets": (lambda client: status(client, b"[" * 1_000_000), 400),
    "the whole context": (lambda client: status(client, body([next(SERIAL) + 9] + [5] * (CONTEXT - 8))), 200),
    "66 long answers": (long_answers, 200),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_stream_goes_on_beside(name: str, url: str, shared_engine: Any) -> None:
    attack, expected = ATTACKS[name]

    async def scenario() -> None:
        async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as client:
            alone = await stream(client)
            running = asyncio.create_task(attack(client))
            while not running.done():
                assert await stream(client) == alone
            assert await running == expected

    asyncio.run(scenario())
    wait_until_idle(shared_engine)
