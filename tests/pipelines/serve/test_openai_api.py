"""The HTTP application, through FastAPI's client: shapes, usage, and every error as an OpenAI error object."""

import asyncio
import contextlib
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.serve.api_response import response_json
from moray.pipelines.serve.async_engine import AsyncEngine
from moray.pipelines.serve.completion_response import CompletionResponse
from moray.pipelines.serve.gateway import VERSION
from moray.pipelines.serve.key_check import KeyCheck
from moray.pipelines.serve.openai_api import build_serving_app
from moray.pipelines.serve.report import ServingReport
from moray.platform.core.api_keys import ApiKey, hash_key
from moray.platform.core.serving import ServedModel

BODY = {"model": "tiny", "prompt": "In the beginning", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(shared_engine):
    with TestClient(build_serving_app(AsyncEngine(shared_engine), "tiny"), raise_server_exceptions=False) as client:
        yield client


def ask(client, **changes):
    return client.post("/v1/completions", json={**BODY, **changes})


def events(response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_health_and_models(client):
    assert client.get("/health").json() == {"status": "ok"}
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("tiny", "model", "moray")
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/default").json() == card


def test_every_reference_in_the_openapi_document_is_defined(client):
    document = client.get("/openapi.json").json()
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named
    assert named <= set(document["components"]["schemas"])
    assert "$defs" not in json.dumps(document)


def test_a_completion(client, vocabulary):
    body = ask(client).json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    prompt = 1 + len(vocabulary.encode(BODY["prompt"]))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_same_prompt_as_ids_and_in_lists(client, vocabulary):
    text = ask(client).json()["choices"][0]["text"]
    ids = vocabulary.encode(BODY["prompt"])
    assert ask(client, prompt=ids).json()["choices"][0]["text"] == text
    for prompts in ([BODY["prompt"], "x"], [ids, vocabulary.encode("x")]):
        body = ask(client, prompt=prompts).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert body["choices"][0]["text"] == text
        assert body["usage"]["completion_tokens"] == 16


def test_defaults_are_those_of_the_api(client):
    body = client.post("/v1/completions", json={"prompt": "In", "ignore_eos": True, "temperature": None}).json()
    assert body["model"] == "tiny"
    assert body["usage"]["completion_tokens"] == 16


def test_echo_and_logprobs(client):
    body = ask(client, echo=True, logprobs=2).json()
    (choice,) = body["choices"]
    assert choice["text"].startswith("In the beginning")
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {body["usage"]["total_tokens"] - 1}
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][offset : offset + len(token)] == token


def test_stop_strings_are_cut_off(client):
    full = ask(client, max_tokens=30).json()["choices"][0]["text"]
    choice = ask(client, max_tokens=30, stop=full[6:9]).json()["choices"][0]
    assert choice["text"] == full[: full.find(full[6:9])]
    assert choice["finish_reason"] == "stop"


def test_a_seed_repeats(client):
    first, second = (ask(client, temperature=1.5, seed=9, max_tokens=20).json()["choices"][0] for _ in range(2))
    assert first == second


def test_n_choices_of_a_prompt(client):
    one = ask(client, temperature=1.5, seed=9, max_tokens=12).json()
    body = ask(client, temperature=1.5, seed=9, max_tokens=12, n=3, prompt=["In the", "世界"]).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts[:3])) == 3
    assert texts[0] == ask(client, temperature=1.5, seed=9, max_tokens=12, prompt="In the").json()["choices"][0]["text"]
    assert body["usage"]["completion_tokens"] == 6 * 12
    two = ask(client, prompt=["In the", "世界"], max_tokens=12).json()
    assert body["usage"]["prompt_tokens"] == two["usage"]["prompt_tokens"]
    assert one["usage"]["completion_tokens"] == 12


def test_ids_are_biased_penalized_and_stop(client):
    def ids(**options):
        logprobs = ask(client, logprobs=0, max_tokens=12, **options).json()["choices"][0]["logprobs"]
        return logprobs["tokens"]

    plain = ids()
    assert ids(logit_bias={"40": 100}) == [ids(logit_bias={"40": 100})[0]] * 12
    assert len(set(ids(frequency_penalty=2.0, presence_penalty=2.0, logit_bias={"40": 100, "41": 99}))) > 1
    assert plain[0] == ids(top_k=1, temperature=1.5)[0]
    assert plain == ids(min_p=1.0, temperature=1.5)
    stopped = ask(client, max_tokens=12, logit_bias={"40": 100}, stop_token_ids=[40])
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    assert stopped.json()["usage"]["completion_tokens"] == 1
    longer = ask(client, max_tokens=12, logit_bias={"40": 100}, stop_token_ids=[40], min_tokens=5)
    assert longer.json()["usage"]["completion_tokens"] == 6


def test_a_stream_joins_to_the_whole(client):
    whole = ask(client, logprobs=1, echo=True, prompt=["In the", "世界"], max_tokens=12).json()
    response = ask(client, logprobs=1, echo=True, prompt=["In the", "世界"], max_tokens=12, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for index in (0, 1):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == whole["choices"][index]["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for name, values in whole["choices"][index]["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


def test_a_stream_reports_usage_only_on_request(client):
    *chunks, last, done = events(ask(client, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == ask(client).json()["usage"]


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"prompt": []}, "prompt", "prompt: must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "prompt: must be a string"),
        ({"prompt": [[]]}, "prompt", "prompt: must be a string"),
        ({"prompt": None}, "prompt", "field required"),
        ({"prompt": [99999]}, "prompt", "id 99999"),
        ({"prompt": [-1]}, "prompt", "id -1"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": "8"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": list("abcde")}, "stop", "up to 4"),
        ({"seed": 1 << 63}, "seed", "64 bits"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 100, "prompt": ["a"] * 3}, "n", "up to 256"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"5": 60, "05": 60}}, "logit_bias", "names an id twice"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "outside the vocabulary"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream"),
        ({"stop": ["x" * 1025]}, "stop", "up to 1024 characters"),
        ({"prompt": ["a"] * 129}, "prompt", "up to 128 prompts"),
        ({"prompt": [[1]] * 129}, "prompt", "up to 128 prompts"),
        ({"response_format": {"type": "json"}}, "response_format", "response_format.type: input should be 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be given"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "/v1/chat/completions"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens", "must not exceed max_tokens"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "outside the vocabulary"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids", "valid integer"),
        ({"add_special_tokens": False}, "add_special_tokens", "not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
        ({"guided_json": {"type": "object"}}, "guided_json", "use structured_outputs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
        ({"temprature": 0.5}, "temprature", "did you mean temperature?"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options",
            "stream_options.usage: is not supported",
        ),
    ],
)
def test_bad_values_are_refused_by_name(client, changes, param, says):
    # As ASCII escapes: a lone surrogate has no UTF-8, but JSON can spell it.
    content = json.dumps({**BODY, **changes})
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert says in error["message"]


def test_values_that_change_nothing_are_accepted(client):
    nothing = {"n": 1, "best_of": 1, "logit_bias": {}, "presence_penalty": 0, "suffix": "", "min_tokens": 0}
    nothing |= {"response_format": {"type": "text"}, "stop_token_ids": [], "add_special_tokens": True}
    assert ask(client, **nothing, user="me", metadata={"run": "1"}, guided_json=None).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_is_refused_before_anything_runs(client, stream):
    response = ask(client, max_tokens=256, stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_an_unknown_model(client):
    for response in (ask(client, model="gpt-x"), client.get("/v1/models/gpt-x")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
    assert ask(client, model="default").json()["model"] == "tiny"


@pytest.mark.parametrize("content", [b"{not json", b"", b"[1]", b'"text"', b'{"prompt": NaN}'])
def test_a_malformed_body(client, content):
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_another_kind_or_too_deep(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/v1/completions", content=json.dumps(BODY), headers={"Content-Type": kind})
        assert response.status_code == 400
        assert "application/json" in response.json()["error"]["message"]
    deep = b'{"prompt": ' + b"[" * 200_000
    response = client.post("/v1/completions", content=deep, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


def test_a_body_larger_than_the_limit(client):
    """With a Content-Length, and in chunks without one."""
    body = json.dumps({**BODY, "prompt": "a" * (6 << 20)}).encode()
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    for content in (body, pieces):
        response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert "the body exceeds 1,048,576 bytes" in response.json()["error"]["message"]
    assert ask(client).status_code == 200


def test_more_ids_than_fit_several_contexts_are_refused_before_they_are_parsed(client):
    response = client.post(
        "/v1/completions",
        content=b'{"prompt": [' + b"5," * 300_000 + b"5]}",
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    assert "commas" in response.json()["error"]["message"]


def test_a_top_k_beyond_any_float_is_all_ids(client):
    assert ask(client, top_k=10**400, seed=4).json()["choices"] == ask(client, seed=4, top_k=340).json()["choices"]


def test_a_text_longer_than_any_context_is_refused_before_it_is_tokenised(client, vocabulary, monkeypatch):
    monkeypatch.setattr(vocabulary, "encode", None)
    response = ask(client, prompt="a" * 500_000)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_work_that_grows_with_a_request_does_not_block_the_event_loop(client, vocabulary, monkeypatch):
    """Tokenizing and building a response wait here until the server has answered another client."""
    started, answered = threading.Event(), threading.Event()
    encode, whole = vocabulary.encode, CompletionResponse.whole

    def slowly(work):
        def run(*arguments):
            started.set()
            assert answered.wait(60), "the event loop was busy"
            return work(*arguments)

        return run

    for patched, name, work in ((vocabulary, "encode", encode), (CompletionResponse, "whole", whole)):
        started.clear()
        answered.clear()
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
            patch.setattr(patched, name, slowly(work))
            asked = pool.submit(ask, client, prompt=["In the beginning " * 10] * 40, echo=True, logprobs=5)
            assert started.wait(60)
            assert client.get("/health").status_code == 200
            answered.set()
            assert len(asked.result().json()["choices"]) == 40


def test_the_description_of_the_api_has_the_body(client):
    schema = client.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "max_tokens" in schema["content"]["application/json"]["schema"]["properties"]


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text('aé"\n🙂'),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("kü"), inner),
    ),
    st.integers(0, 1500),
)
def test_json_in_slices_is_the_same_json(value, repeats):
    assert json.loads(response_json(value)) == value
    many = {"list": [value] * repeats}
    assert response_json(many) == json.dumps(many, ensure_ascii=False, separators=(",", ":")).encode()


def test_unknown_paths_and_methods(client):
    for response, status in ((client.get("/v2/models"), 404), (client.get("/v1/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_failure_of_the_model_is_one_error_and_the_next_request_is_answered(client, shared_engine, monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError("secret path")

    with monkeypatch.context() as broken:
        broken.setattr(shared_engine.model, "forward", failing)
        response = ask(client)
        streamed = events(ask(client, stream=True))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert VERSION.decode() in response.headers  # so the gateway does not send it to the other replicas
    assert "secret" not in response.text
    assert [set(event) for event in streamed] == [{"error"}]
    assert ask(client).status_code == 200


def test_a_stopped_engine_is_not_healthy(make_engine):
    engine = AsyncEngine(make_engine())
    with TestClient(build_serving_app(engine, "tiny"), raise_server_exceptions=False) as client:
        engine.stop()
        stopped = client.get("/health")
        assert (stopped.status_code, VERSION.decode() in stopped.headers) == (503, False)
        assert ask(client).status_code == 503
        engine.stop = lambda: None  # it has ended; the lifespan need not


def test_a_full_queue_is_429_and_has_room_later(make_engine):
    engine = AsyncEngine(make_engine(), most_open=3)
    with TestClient(build_serving_app(engine, "tiny")) as client:
        response = ask(client, prompt=["a", "b"], n=2)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "x-moray-queue-full" not in response.headers  # a smaller request has room
        assert ask(client, prompt=["a", "b"], n=2, stream=True).status_code == 429
        for _ in range(3):
            assert ask(client, prompt=["a", "b", "c"]).status_code == 200


def test_a_burst_is_refused_before_its_streams_begin(make_engine):
    """Named after a bug that a load test found: requests that arrived together passed the queue's check together, and
    some then ended with an error inside of a stream."""
    engine = AsyncEngine(make_engine(), most_open=3)
    with TestClient(build_serving_app(engine, "tiny"), raise_server_exceptions=False) as client:
        with ThreadPoolExecutor(12) as pool:
            responses = list(pool.map(lambda _: ask(client, stream=True, max_tokens=40), range(24)))
        assert {response.status_code for response in responses} == {200, 429}
        assert all("error" not in response.text for response in responses if response.status_code == 200)
        assert ask(client, n=4).status_code == 429
        assert ask(client, n=3).status_code == 200
        assert engine._open == 0


def test_room_and_tokens_are_released_if_nobody_reads_the_stream(make_engine):
    engine, keys = AsyncEngine(make_engine(), most_open=3), KeyCheck(required=True)
    report = ServingReport(ServedModel(folder="", name="tiny"), engine, "")
    key = ApiKey(name="k", sha256=hash_key("mk-k"), tokens=60)
    keys.update([key.model_dump()])
    app = build_serving_app(engine, "tiny", report=report, keys=keys)
    body = json.dumps({**BODY, "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer mk-k")],
        "asgi": {"version": "3.0"}, "http_version": "1.1",
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body}, *[{"type": "http.disconnect"}] * 9]

    async def receive():
        return messages.pop(0)

    async def send(message):
        raise OSError("the client is gone")

    with TestClient(app), contextlib.suppress(Exception):
        asyncio.run(app(scope, receive, send))
    assert engine._open == 0
    assert (report.event().requests, report.event().cancelled) == (1, 1)
    prompt = report.event().prompt_tokens
    assert keys.meter._own._bucket(key, "tokens", 60).left == pytest.approx(60 - prompt, abs=2)
