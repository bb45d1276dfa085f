"""When the interpreter of a server collects its garbage."""

import asyncio
import gc
import sys

from moray.pipelines.serve.interpreter import CollectsWhenCalm, serving_interpreter


class Server:
    """An application whose requests end when told to, with a clock and counted collections."""

    def __init__(self) -> None:
        self.now, self.collections = 100.0, 0
        self.ends: list[asyncio.Event] = []
        self.app = CollectsWhenCalm(self.request, self.collect, lambda: self.now, idle_seconds=0.0)

    def collect(self) -> None:
        self.collections += 1

    async def request(self, scope, receive, send) -> None:
        self.ends.append(asyncio.Event())
        await self.ends[-1].wait()

    async def open(self, count: int) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.app({"type": "http"}, None, None)) for _ in range(count)]
        await asyncio.sleep(0)
        return tasks

    async def close(self, task: asyncio.Task[None]) -> None:
        self.ends.pop(0).set()
        await task


def test_it_collects_rarely_while_many_requests_are_open() -> None:
    async def scenario() -> None:
        server = Server()
        tasks = await server.open(40)
        server.now += 60
        await server.close(tasks.pop(0))
        assert server.collections == 0
        server.now += 61
        await server.close(tasks.pop(0))
        assert server.collections == 1
        await server.close(tasks.pop(0))
        assert server.collections == 1
        while len(tasks) > 17:
            await server.close(tasks.pop(0))
        server.now += 11
        await server.close(tasks.pop(0))
        assert server.collections == 2  # few are open
        while tasks:
            await server.close(tasks.pop(0))
        assert server.collections == 2
        await asyncio.sleep(0.01)
        assert server.collections == 3  # none is

    asyncio.run(scenario())


def test_the_interpreters_settings_are_restored() -> None:
    """By the last of several servers, whichever began first."""
    before = gc.get_threshold(), sys.getswitchinterval()
    one, other = serving_interpreter(), serving_interpreter()
    one.__enter__()
    inside = gc.get_threshold(), sys.getswitchinterval()
    other.__enter__()
    one.__exit__(None, None, None)
    assert (gc.get_threshold(), sys.getswitchinterval()) == inside
    other.__exit__(None, None, None)
    assert (gc.get_threshold(), sys.getswitchinterval()) == before
    assert inside[0][2] > 1_000_000
    assert inside[1] <= 0.001
