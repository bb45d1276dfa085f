"""`/v1/embeddings` through the real `openai` client: the mean of the states of one forward."""

import openai
import pytest
import torch

from moray.pipelines.serve.sequence import Request
from tests.pipelines.serve.chats import PLAIN, chat_client, chat_engine, chat_vocabulary

TEXTS = ["In the beginning was the word.", "x", "def main(argument): return 42 " * 20]


@pytest.fixture(scope="module")
def engine():
    return chat_engine(chat_vocabulary())


@pytest.fixture(scope="module")
def http(engine):
    with chat_client(chat_engine(engine.vocabulary), PLAIN) as http:
        yield http


def client_of(http) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


def test_an_embedding_is_the_mean_of_the_states_of_a_forward(http, engine) -> None:
    """The texts are read together, the long one in several chunks."""
    from moray.models.rows import Span

    found = client_of(http).embeddings.create(model="tiny", input=TEXTS)
    assert [one.index for one in found.data] == [0, 1, 2]
    tokens = 0
    for text, one in zip(TEXTS, found.data, strict=True):
        ids = [engine.vocabulary.bos, *engine.vocabulary.encode(text)]
        tokens += len(ids)
        blocks = list(range(-(-len(ids) // 32)))
        states = engine.model.forward([Span(ids, 0, blocks, len(ids))], engine.model.cache(len(blocks), 32)).hidden_WD
        mean = torch.nn.functional.normalize(states.mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(one.embedding), mean, atol=1e-5, rtol=1e-4)
    assert found.usage.prompt_tokens == found.usage.total_tokens == tokens


def test_numbers_texts_ids_and_base64_are_the_same(http, engine) -> None:
    client = client_of(http)
    ids = engine.vocabulary.encode(TEXTS[0])
    (whole,) = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float").data
    for given in (ids, [ids], [TEXTS[0]]):
        (other,) = client.embeddings.create(model="tiny", input=given, encoding_format="base64").data
        assert isinstance(other.embedding, str)
        (decoded,) = client.embeddings.create(model="tiny", input=given).data  # the client asks for base64
        assert decoded.embedding == pytest.approx(whole.embedding, abs=1e-6)
    assert len(whole.embedding) == engine.config.hidden_size
    assert sum(value * value for value in whole.embedding) == pytest.approx(1.0, abs=1e-5)


def test_a_prompt_read_before_is_read_again(engine) -> None:
    """Its blocks are in the cache, but not its states. Other answers run beside it."""
    prompt = tuple(engine.vocabulary.encode(TEXTS[2]))
    results = []
    for _ in range(2):
        asked = [engine.submit(Request(prompt, max_tokens=0, temperature=0.0, embed=True))]
        asked.append(engine.submit(Request(prompt, max_tokens=8, temperature=0.0)))
        while engine.busy:
            results += [one.result.embedding for one in engine.step() if one.result.embedding is not None]
    assert len(results) == 2
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "must be a string"),
        ({"input": [10**6]}, "input", "outside the vocabulary"),
        ({"input": [5] * 5000}, "input", "maximum context length"),
        ({"input": "x", "dimensions": 8}, "dimensions", "hidden size"),
        ({"input": "x", "encoding_format": "int"}, "encoding_format", "float"),
        ({"input": "x", "stream": True}, "stream", "not supported"),
        ({"input": "x", "model": "other"}, "model", "does not exist"),
    ],
)
def test_what_is_refused_is_named(http, fields, param, says) -> None:
    response = http.post("/v1/embeddings", json=fields)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param
    assert says in error["message"]
