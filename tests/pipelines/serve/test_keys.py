"""Keys at the HTTP interface, their limits, and fair shares between them."""

import json
import math

import openai
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from moray.pipelines.serve.async_engine import AsyncEngine
from moray.pipelines.serve.key_check import KeyCheck
from moray.pipelines.serve.key_meter import KeyMeter
from moray.pipelines.serve.metrics import ReplicaMetrics, as_text
from moray.pipelines.serve.openai_api import build_serving_app
from moray.pipelines.serve.report import ServingReport
from moray.platform.core.api_keys import ApiKey, hash_key
from moray.platform.core.events import ServingEvent
from moray.platform.core.serving import ServedModel, key_settings
from tests.pipelines.serve.chats import PLAIN, chat_form

BODY = {"prompt": "In the beginning", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
OPEN = ApiKey(name="open", sha256=hash_key("mk-open"))
LIMITED = ApiKey(name="limited", sha256=hash_key("mk-limited"), requests=2, tokens=1000)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def key(requests: int = 0, tokens: int = 0) -> ApiKey:
    return ApiKey(name="k", sha256="0", requests=requests, tokens=tokens)


@pytest.fixture
def served(make_engine):
    engine, keys = AsyncEngine(make_engine()), KeyCheck(required=True)
    keys.update(key_settings([OPEN, LIMITED])["keys"])
    report = ServingReport(ServedModel(folder="", name="tiny"), engine, "")
    with TestClient(build_serving_app(engine, "tiny", report=report, keys=keys), raise_server_exceptions=False) as http:
        yield http, keys, report


def ask(http, text: str, **changes):
    headers = {"Authorization": f"Bearer {text}"} if text else {}
    return http.post("/v1/completions", json={**BODY, **changes}, headers=headers)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/tokenizer_info", "/openapi.json", "/nowhere"])
def test_nothing_is_told_without_a_key(served, path):
    http, _, _ = served
    response = http.get(path)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.json()["error"]["code"] == "no_api_key"
    assert http.get(path, headers={"Authorization": "Bearer mk-other"}).json()["error"]["code"] == "invalid_api_key"
    assert http.get(path, headers={"Authorization": "Bearer mk-open"}).status_code != 401


@pytest.mark.parametrize(
    "header", ["", "mk-open", "Basic mk-open", "Bearer", "Bearer  ", "Bearer mk-open x", "Bearer \xe9"]
)
def test_headers_that_are_no_key(served, header):
    http, _, _ = served
    response = http.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
    assert response.status_code == 401


def test_health_needs_no_key(served):
    assert served[0].get("/health").status_code == 200


def test_health_below_a_route_needs_no_key(served):
    """Named after a bug: Serve's paths have the route of the model, so a server with keys never became healthy."""
    http, _, _ = served
    below = TestClient(http.app, root_path="/tiny")
    assert below.get("/tiny/health").status_code == 200
    assert below.get("/tiny/v1/models").status_code == 401


def test_the_clients_own_exceptions(served):
    http, _, _ = served
    good = openai.OpenAI(base_url="http://testserver/v1", api_key="mk-open", http_client=http, max_retries=0)
    assert good.completions.create(model="tiny", prompt="In", max_tokens=2).usage.completion_tokens
    bad = openai.OpenAI(base_url="http://testserver/v1", api_key="mk-bad", http_client=http, max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        bad.models.list()


def test_a_revoked_key_ends_at_once(served):
    http, keys, _ = served
    assert ask(http, "mk-open").status_code == 200
    keys.update(key_settings([LIMITED])["keys"])
    assert ask(http, "mk-open").status_code == 401


def test_requests_per_minute(served):
    http, keys, _ = served
    keys.meter._own._clock = clock = Clock()
    first = ask(http, "mk-limited")
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "30.000s"
    assert ask(http, "mk-limited", stream=True).headers["x-ratelimit-remaining-requests"] == "0"
    refused = ask(http, "mk-limited")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert "limit of 2 requests a minute" in error["message"]
    assert refused.headers["retry-after"] == "30"
    assert ask(http, "mk-open").status_code == 200
    clock.now += 31
    assert ask(http, "mk-limited").status_code == 200


def test_tokens_per_minute_are_those_that_were_used(served):
    http, keys, _ = served
    keys.meter._own._clock = Clock()
    small = ApiKey(name="small", sha256=hash_key("mk-small"), tokens=60)
    keys.update(key_settings([small])["keys"])
    assert ask(http, "mk-small", max_tokens=45).json()["usage"]["completion_tokens"] == 45
    again = ask(http, "mk-small", max_tokens=8)
    assert again.status_code == 429
    assert "tokens a minute is reached" in again.json()["error"]["message"]
    large = ask(http, "mk-small", max_tokens=100)
    assert (large.status_code, "retry-after" in large.headers) == (429, False)
    assert "send a smaller one" in large.json()["error"]["message"]


def test_what_was_asked_for_and_not_generated_is_given_back(served):
    http, keys, _ = served
    keys.meter._own._clock = Clock()
    stop = ask(http, "mk-open").json()["choices"][0]["text"][:1]
    reply = ask(http, "mk-limited", max_tokens=200, stop=stop)
    assert reply.json()["usage"]["completion_tokens"] < 200
    left = ask(http, "mk-limited", max_tokens=1).headers["x-ratelimit-remaining-tokens"]
    spent = reply.json()["usage"]["total_tokens"] + ask(http, "mk-open", max_tokens=1).json()["usage"]["total_tokens"]
    assert int(left) == 1000 - spent


def test_a_request_without_max_tokens_takes_a_sixteenth_of_a_minute(make_engine, vocabulary):
    """Named after a key that was locked out for half an hour: its requests took nothing until they had ended."""
    keys, clock = KeyCheck(required=True), Clock()
    keys.update(key_settings([LIMITED])["keys"])
    keys.meter._own._clock = clock
    engine = AsyncEngine(make_engine())
    with TestClient(build_serving_app(engine, "tiny", keys=keys, chat=chat_form(vocabulary, PLAIN))) as http:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        headers = {"Authorization": "Bearer mk-limited"}
        reply = http.post("/v1/chat/completions", json=body, headers=headers)
        left = int(reply.headers["x-ratelimit-remaining-tokens"])
        assert 1000 - 1000 // 16 - 60 < left <= 1000 - 1000 // 16


def test_usage_is_counted_by_key(served):
    http, _, report = served
    usage = [ask(http, text).json()["usage"] for text in ("mk-open", "mk-limited", "mk-open")]
    list(ask(http, "mk-limited", stream=True).iter_lines())
    prompt = usage[0]["prompt_tokens"]
    assert report.event().keys == {"open": (2, 2 * prompt, 16), "limited": (2, 2 * prompt, 16)}
    assert json.loads(report.event().model_dump_json())["keys"]["open"] == [2, 2 * prompt, 16]


def test_a_bucket_fills_and_never_holds_more_than_a_minute():
    meter = KeyMeter(clock := Clock())
    one = key(requests=60)
    assert [meter.take(one, 0).wait for _ in range(60)] == [0.0] * 60
    assert meter.take(one, 0).wait == pytest.approx(1.0)
    clock.now += 1.0
    assert meter.take(one, 0).wait == 0.0
    clock.now += 10_000
    assert [meter.take(one, 0).wait for _ in range(61)] == [0.0] * 60 + [pytest.approx(1.0)]


def test_a_refused_request_takes_nothing():
    meter = KeyMeter(Clock())
    one = key(requests=5, tokens=10)
    assert meter.take(one, 10).wait == 0.0
    for _ in range(3):
        quota = meter.take(one, 10)
        assert (quota.short, quota.headers["x-ratelimit-remaining-requests"]) == ("tokens", "4")
    assert math.isinf(meter.take(one, 11).wait)


def test_a_changed_limit_counts_what_was_taken():
    meter = KeyMeter(Clock())
    meter.take(key(tokens=100), 80)
    assert meter.take(key(tokens=1000), 900).wait == 0.0
    assert meter.take(key(tokens=1000), 100).wait > 0.0


def test_a_clock_that_jumps_back_gives_nothing():
    meter = KeyMeter(clock := Clock())
    one = key(requests=1)
    meter.take(one, 0)
    clock.now -= 1000
    assert meter.take(one, 0).wait == pytest.approx(60)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.integers(-50, 50)), max_size=40))
def test_no_minute_has_more_than_its_limit_and_a_full_bucket(steps):
    meter, one = KeyMeter(clock := Clock()), key(tokens=100)
    taken = 0.0
    for seconds, tokens, unused in steps:
        clock.now += seconds
        if meter.take(one, tokens).wait == 0.0:
            taken += tokens
            back = min(tokens, max(unused, 0))
            meter.give(one, back)
            taken -= back
        assert taken <= 100 + (clock.now - 100.0) * 100 / 60 + 1e-6


def test_metrics_of_a_replica(served):
    http, _, _ = served
    for text in ("mk-open", "mk-limited"):
        ask(http, text)
    ask(http, "mk-open", top_p=2)
    shown = http.get("/metrics", headers={"Authorization": "Bearer mk-open"})
    assert shown.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(shown.text)
        for sample in family.samples
    }
    here = (("model", "tiny"), ("replica", ""))
    assert found["moray_requests_total", (("model", "tiny"), ("outcome", "answered"), ("replica", ""))] == 2
    assert found["moray_requests_total", (("model", "tiny"), ("outcome", "refused"), ("replica", ""))] == 1
    assert found["moray_completion_tokens_total", here] == 16
    assert found["moray_time_to_first_token_seconds_count", here] == 2
    assert found["moray_time_per_output_token_seconds_count", here] == 2
    assert found["moray_key_requests_total", (("key", "open"), *here)] == 1
    assert ("moray_requests_waiting", here) in found
    assert any(name == "moray_expert_load_ratio" for name, _ in found)


def test_metrics_of_several_replicas_are_one_family():
    metrics = [
        metric
        for replica in ("a", "b")
        for metric in ReplicaMetrics("m", replica).collect(
            ServingEvent(deployment="m", version="", reference="", replica=replica)
        )
    ]
    text = as_text(metrics).decode()
    assert text.count("# TYPE moray_requests_waiting gauge") == 1
    assert text.count("moray_requests_waiting{") == 2
