"""`/v1/responses` through the real `openai` client, equal to `/v1/chat/completions`."""

import json

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.responses_request import ResponsesRequest
from tests.pipelines.serve.chats import DIRECT, PLAIN, REASONING, chat_client, chat_engine, chat_vocabulary

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
SETTINGS = {"model": "tiny", "input": "In the beginning", "extra_body": {"seed": 3}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return chat_engine(chat_vocabulary())


@pytest.fixture(scope="module", params={"plain": PLAIN, "reasoning": REASONING, "direct": DIRECT}.items())
def any_http(request, engine):
    with chat_client(chat_engine(engine.vocabulary), request.param[1]) as http:
        yield http


@pytest.fixture(scope="module")
def http(engine):
    with chat_client(chat_engine(engine.vocabulary), REASONING) as http:
        yield http


def client_of(http) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


def texts(response) -> dict[str, str]:
    return {
        item.type: item.arguments if item.type == "function_call" else item.content[0].text for item in response.output
    }


def test_the_answer_is_that_of_a_chat(any_http) -> None:
    client = client_of(any_http)
    response = client.responses.create(
        model="tiny", instructions="Be brief.", input="In the beginning", max_output_tokens=60, extra_body={"seed": 3}
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "In the beginning"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=60, seed=3)
    message = chat.choices[0].message
    found = texts(response)
    assert response.output_text == (message.content or "")
    assert found.get("reasoning", "") == getattr(message, "reasoning_content", "")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    reasons = {"stop": None, "length": "max_output_tokens"}
    reason = response.incomplete_details.reason if response.incomplete_details else None
    assert reason == reasons[chat.choices[0].finish_reason]
    assert response.status == ("incomplete" if reason else "completed")
    assert response.output[-1].status == response.status
    assert response.instructions == "Be brief."


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "required"}, {"max_output_tokens": 5}])
def test_a_stream_builds_up_the_response(any_http, fields) -> None:
    """By the client's own accumulation, and event by event."""
    client = client_of(any_http)
    if "tools" in fields and "tools" not in any_http.get("/tokenizer_info").json()["chat_template"]:
        pytest.skip("the template has no tools")
    whole = client.responses.create(**SETTINGS | fields)
    with client.responses.stream(**SETTINGS | fields) as stream:
        events = list(stream)
        # The client has no final response of one that is incomplete.
        final = stream.get_final_response() if whole.status == "completed" else events[-1].response
    assert texts(final) == texts(whole)
    assert final.status == whole.status
    assert final.usage.total_tokens == whole.usage.total_tokens
    raw = list(client.responses.create(**SETTINGS | fields, stream=True))
    assert [one.sequence_number for one in raw] == list(range(len(raw)))
    assert [one.type for one in raw[:2]] == ["response.created", "response.in_progress"]
    assert raw[-1].type == f"response.{final.status}"
    assert {one.type for one in raw} <= {one.type for one in events}
    for place, item in enumerate(raw[-1].response.output):
        mine = [one for one in raw if getattr(one, "output_index", None) == place]
        assert (mine[0].type, mine[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert mine[-1].item == item
        written = "".join(one.delta for one in mine if one.type.endswith(".delta"))
        assert written == (item.arguments if item.type == "function_call" else item.content[0].text)
        done = next(one for one in mine if one.type.endswith(("text.done", "arguments.done")))
        assert (done.arguments if item.type == "function_call" else done.text) == written


def test_a_call_and_its_result(http) -> None:
    client = client_of(http)
    first = client.responses.create(**SETTINGS, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})
    (call,) = [item for item in first.output if item.type == "function_call"]
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    assert call.name == "weather"
    conversation = [
        {"role": "user", "content": [{"type": "input_text", "text": "How is it?"}]},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    second = client.responses.create(model="tiny", input=conversation, tools=[WEATHER], max_output_tokens=8)
    assert second.usage.input_tokens > first.usage.input_tokens
    again = client.responses.create(model="tiny", input=conversation, tools=[WEATHER], max_output_tokens=8)
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_structured_output(http) -> None:
    class City(BaseModel):
        city: str

    client = client_of(http)
    form = {"type": "json_schema", "name": "city", "schema": PARAMETERS, "strict": True}
    response = client.responses.create(**SETTINGS, text={"format": form})
    jsonschema.validate(json.loads(response.output_text), PARAMETERS)
    assert response.text.format.type == "json_schema"
    parsed = client.responses.parse(**SETTINGS, text_format=City)
    assert parsed.status == "incomplete" or isinstance(parsed.output_parsed, City)


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": PARAMETERS},
        {"regex": "[ab]"},
        {"choice": ["yes", "no"]},
        {"grammar": 'start: "a"'},
        {"json_object": True},
    ],
)
def test_structured_outputs_of_all_kinds(http, wanted) -> None:
    response = http.post("/v1/responses", json={"input": "x", "structured_outputs": wanted, "max_output_tokens": 90})
    assert response.status_code == 200, response.text


def test_a_failure_in_a_stream_is_typed(engine, monkeypatch) -> None:
    """As Codex reads it, which ignores events without a type; `openai` raises the error."""
    mine = chat_engine(engine.vocabulary)

    def failing(*arguments, **options):
        raise RuntimeError("broken on purpose")

    with chat_client(mine, PLAIN) as http:
        monkeypatch.setattr(mine.model, "forward", failing)
        text = http.post("/v1/responses", json={"input": "x", "stream": True}).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        assert [one["type"] for one in events[-2:]] == ["response.failed", "error"]
        assert "failed on this request" in events[-2]["response"]["error"]["message"]
        with pytest.raises(openai.APIError, match="failed on this request"):
            list(client_of(http).responses.create(**SETTINGS, stream=True))


def test_items_of_a_turn_are_one_message() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}], "id": "m"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": "e"},
    ]
    chat = ResponsesRequest.model_validate({"input": items, "instructions": "i"}).chat()
    assert [(one.role, one.content) for one in chat.messages] == [
        ("system", "i"), ("user", "a"), ("assistant", "b"), ("tool", "r"), ("assistant", "c"), ("assistant", "d"),
        ("user", "e"),
    ]  # fmt: skip
    turn = chat.messages[2]
    assert turn.reasoning_content == "hm"
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [("1", "{}"), ("2", '{"x": 1}')]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": []}, "input", "a text that is not empty"),
        ({"input": ""}, "input", "a text that is not empty"),
        ({}, "input", "required"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "type message, function_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input_image"),
        
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"conversation": "c"}, "conversation", "stores no conversations"),
        ({"messages": []}, "messages", "use input"),
        ({"max_tokens": 5}, "max_tokens", "/v1/chat/completions"),
        ({"response_format": {"type": "text"}}, "response_format", "use text"),
        ({"background": True}, "background", "is not supported"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"include": ["message.output_text.logprobs"]}, "include", "is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"tool_choice": {"type": "function", "name": "no"}, "tools": [WEATHER]}, "tool_choice", "not in tools"),
        ({"tool_choice": "required"}, "tool_choice", "when tools are given"),
        ({"text": {"format": {"type": "json_schema"}}}, "text", "must be given with type json_schema"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "does not read"),
        ({"reasoning": {"summary": "auto"}}, "reasoning", "none"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "5000 in max_output_tokens"),
        ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens", "must not exceed max_output_tokens"),
        ({"tool_choice": {"type": "function", "function": {}}, "tools": [WEATHER]}, "tool_choice", '"name": NAME'),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"uniqueItems": True}}}}, "text", "unique"),
        ({"instruction": "x"}, "instruction", "did you mean instructions"),
        ({"model": "other"}, "model", "does not exist"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(http, fields, param, says) -> None:
    body = {"input": "x", **fields} if fields else {}
    response = http.post("/v1/responses", json=body)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param
    assert says.lower() in error["message"].lower()


def test_what_changes_nothing_is_accepted(http) -> None:
    """As agents send it."""
    body = {
        "model": "tiny", "input": [{"type": "message", "role": "user", "content": "x", "id": "m"}], "store": False,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "parallel_tool_calls": True,
        "truncation": "disabled", "metadata": {"a": "b"}, "text": {"verbosity": "medium"}, "max_output_tokens": 4,
        "tool_choice": "auto", "stream": True, "stream_options": {"include_obfuscation": False}, "service_tier": "auto",
        "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "user": "u",
    }  # fmt: skip
    response = http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    assert response.text.startswith("event: response.created\ndata: {")
    last = json.loads(response.text.strip().rpartition("data: ")[2])
    assert last["type"] in ("response.completed", "response.incomplete")
