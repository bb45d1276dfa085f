"""The real `openai` client against a real server on loopback."""

import asyncio
import time

import openai
import pytest

PROMPT = "In the beginning"
GREEDY = {"model": "tiny", "max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def wait_until_idle(engine) -> None:
    deadline = time.monotonic() + 10
    while engine.busy or engine.pool.blocks_free < engine.pool.blocks:
        assert time.monotonic() < deadline, "blocks were not freed"
        time.sleep(0.001)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_a_completion_and_its_stream(client):
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    stream = client.completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, logprobs=1, **GREEDY
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


def test_async_streams_at_once_answer_as_each_alone(client, url):
    prompts = ["In the beginning", "def main(", "こんにちは", "x"]
    alone = [client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]

    async def one(asking: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await asking.completions.create(prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as asking:
            return await asyncio.gather(*(one(asking, prompt) for prompt in prompts))

    assert asyncio.run(scenario()) == alone


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-x", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt=PROMPT, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10_000, stream=True)
    assert long.value.code == "context_length_exceeded"


def test_an_error_within_a_stream_is_raised(client, shared_engine, monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(shared_engine.model, "forward", failing)
    with pytest.raises(openai.APIError, match="failed on this request"):
        list(client.completions.create(prompt=PROMPT, stream=True, **GREEDY))


def test_a_client_that_leaves_a_stream_frees_its_blocks(client, shared_engine):
    with client.completions.create(prompt=PROMPT, stream=True, **{**GREEDY, "max_tokens": 240}) as stream:
        next(iter(stream))
    wait_until_idle(shared_engine)


def test_a_client_that_gives_up_waiting_frees_its_blocks(client, shared_engine, monkeypatch):
    """The model is made slow enough that only the disconnect can end the request within the test's patience."""
    step = shared_engine.step
    monkeypatch.setattr(shared_engine, "step", lambda: (time.sleep(0.1), step())[1])
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(prompt=PROMPT, **{**GREEDY, "max_tokens": 240})
    wait_until_idle(shared_engine)
