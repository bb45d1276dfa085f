import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from moray.pipelines.serve.async_engine import AsyncEngine, EngineStoppedError
from moray.pipelines.serve.sequence import Delta, Request


@asynccontextmanager
async def started(engine) -> AsyncIterator[AsyncEngine]:
    front = AsyncEngine(engine)
    front.start()
    try:
        yield front
    finally:
        await asyncio.to_thread(front.stop)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def request(vocabulary, text: str = "In the", max_tokens: int = 10) -> Request:
    return Request(tuple(vocabulary.encode(text)), max_tokens, temperature=0.0, ignore_eos=True)


async def answer(front: AsyncEngine, asked: Request) -> str:
    return "".join([delta.text async for delta in front.generate(asked)])


def test_answers_reach_their_requests(make_engine, vocabulary):
    async def scenario():
        async with started(make_engine()) as front:
            asked = [request(vocabulary, text) for text in ("In the", "def main(", "x")]
            alone = [await answer(front, one) for one in asked]
            assert await asyncio.gather(*(answer(front, one) for one in asked)) == alone

    asyncio.run(scenario())


def test_leaving_early_frees_the_blocks(make_engine, vocabulary):
    engine = make_engine()

    async def scenario():
        async with started(engine) as front:
            async with aclosing(front.generate(request(vocabulary, max_tokens=200))) as deltas:
                async for _ in deltas:
                    break
            await until(lambda: engine.pool.blocks_free == engine.pool.blocks and not engine.busy)

    asyncio.run(scenario())


def test_a_cancelled_task_frees_the_blocks_of_many(make_engine, vocabulary):
    engine = make_engine()

    async def consume(front):
        async for _ in front.generate_many([request(vocabulary, max_tokens=200)] * 3):
            pass

    async def scenario():
        async with started(engine) as front:
            task = asyncio.create_task(consume(front))
            await until(lambda: engine.pool.blocks_free < engine.pool.blocks)
            task.cancel()
            await until(lambda: engine.pool.blocks_free == engine.pool.blocks and not engine.busy)

    asyncio.run(scenario())


def test_the_thread_outlives_a_step_that_fails(make_engine, vocabulary, monkeypatch):
    engine = make_engine()
    step = engine.step
    failures = iter([RuntimeError("a bug")])

    def failing():
        for failure in failures:
            raise failure
        return step()

    monkeypatch.setattr(engine, "step", failing)

    async def scenario():
        async with started(engine) as front:
            with pytest.raises(RuntimeError, match="a bug"):
                await answer(front, request(vocabulary))
            assert engine.pool.blocks_free == engine.pool.blocks
            assert len(await answer(front, request(vocabulary))) > 0

    asyncio.run(scenario())


def test_no_answer_waits_after_a_failure_in_the_middle_of_a_step(make_engine, vocabulary, monkeypatch):
    """Also those that the engine had ended in that step, whose last outputs are lost."""
    engine = make_engine()
    advance = engine._advance

    def failing(chunks):
        for output in advance(chunks):
            if isinstance(output.result, Delta) and output.result.finish_reason:
                raise RuntimeError("a bug")
            yield output

    monkeypatch.setattr(engine, "_advance", failing)

    async def scenario():
        async with started(engine) as front:
            found = await asyncio.gather(
                *(answer(front, request(vocabulary)) for _ in range(3)), return_exceptions=True
            )
            assert [str(one) for one in found] == ["a bug"] * 3

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_ends_is_not_healthy(make_engine, vocabulary, monkeypatch):
    engine = make_engine()

    def dying():
        raise SystemExit

    async def scenario():
        front = AsyncEngine(engine)
        assert not front.failed
        front.start()
        monkeypatch.setattr(engine, "step", dying)
        with pytest.raises(EngineStoppedError):
            await answer(front, request(vocabulary))
        front._thread.join()
        assert front.failed
        front.stop()
        assert not front.failed

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_an_invalid_request_raises_in_its_caller(make_engine):
    async def scenario():
        async with started(make_engine()) as front:
            with pytest.raises(ValueError, match="maximum context length"):
                await answer(front, Request((5,), max_tokens=1000))
            assert front.alive

    asyncio.run(scenario())


def test_stopping_ends_running_requests_and_refuses_new_ones(make_engine, vocabulary):
    async def scenario():
        front = AsyncEngine(make_engine())
        with pytest.raises(EngineStoppedError):
            await answer(front, request(vocabulary))
        front.start()
        deltas = front.generate(request(vocabulary, max_tokens=200))
        await anext(deltas)
        await asyncio.to_thread(front.stop)
        with pytest.raises(EngineStoppedError):
            async for _ in deltas:
                pass
        with pytest.raises(EngineStoppedError):
            await answer(front, request(vocabulary))

    asyncio.run(scenario())
