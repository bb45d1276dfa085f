"""`/v1/chat/completions`, structured output, tools, `/tokenize`: through the real `openai` client and FastAPI's."""

import json
import re

import jsonschema
import openai
import pytest

from moray.pipelines.serve.engine import Engine
from tests.pipelines.serve.chats import DIRECT, PLAIN, REASONING, chat_client, chat_engine, chat_vocabulary

MESSAGES = [{"role": "user", "content": "In the beginning"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "the time"}}
TEMPLATES = {"plain": PLAIN, "reasoning": REASONING, "direct": DIRECT}


def json_schema(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return chat_engine(chat_vocabulary())


@pytest.fixture(scope="module", params=TEMPLATES)
def any_http(request, engine):
    """A server for each template. They take turns with one engine."""
    with chat_client(chat_engine(engine.vocabulary), TEMPLATES[request.param]) as client:
        yield client


@pytest.fixture(scope="module")
def http(engine):
    with chat_client(chat_engine(engine.vocabulary), PLAIN) as client:
        yield client


@pytest.fixture(scope="module")
def reasoning_http(engine):
    with chat_client(chat_engine(engine.vocabulary), REASONING) as client:
        yield client


def openai_client(http) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


def ask(http, **fields):
    body = {"messages": MESSAGES, "max_tokens": 8, "seed": 1, **fields}
    return http.post("/v1/chat/completions", json=body)


def streamed(client: openai.OpenAI, **fields):
    """The message that a stream's chunks join to, by the client's own accumulation."""
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, **fields) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion()


def test_the_first_lines_of_openais_quick_start(http):
    completion = openai_client(http).chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Talk like a pirate."},
            {"role": "user", "content": "How do I check if a Python object is an instance of a class?"},
        ],
        max_completion_tokens=8,
    )
    assert completion.object == "chat.completion"
    assert completion.choices[0].message.role == "assistant"
    assert completion.usage.completion_tokens <= 8


def test_a_stream_joins_to_the_whole_answer(any_http):
    client = openai_client(any_http)
    fields = {"max_completion_tokens": 40, "seed": 3, "temperature": 1.5}
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **fields).choices[0]
    joined = streamed(client, **fields).choices[0]
    assert (joined.message.content or "") == (whole.message.content or "")
    assert joined.finish_reason == whole.finish_reason


def test_the_answer_takes_the_room_that_is_left(http, engine):
    body = ask(http, max_tokens=None, temperature=0, ignore_eos=True).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == engine.config.max_position_embeddings


def test_a_prompt_without_room(http):
    response = ask(http, messages=[{"role": "user", "content": "ab" * 1200}], max_tokens=None)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "fields", [{"response_format": json_schema(PARAMETERS)}, {"structured_outputs": {"regex": "a{3}"}}]
)
def test_text_beside_tools_has_its_form(any_http, fields):
    """Named after a form that was ignored: free text before a call that never came."""
    if "tools" not in any_http.get("/tokenizer_info").json()["chat_template"]:
        pytest.skip("the template has no tools")
    for seed in range(4):
        body = ask(any_http, tools=[WEATHER], seed=seed, max_tokens=200, temperature=1.5, **fields).json()
        message = body["choices"][0]["message"]
        if message.get("tool_calls") or body["choices"][0]["finish_reason"] == "length":
            continue
        assert re.fullmatch("a{3}", message["content"]) or json.loads(message["content"])


def test_a_call_that_was_cut_can_be_sent_back(any_http):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{"}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}, *MESSAGES]
    response = ask(any_http, messages=messages)
    if response.status_code == 400:  # of a template that reads an object
        assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("wanted", [{"json": {"$ref": "#"}}, {"grammar": "start: start"}, {"regex": r"[^\s\S]"}])
def test_a_form_that_nothing_has(http, wanted):
    error = ask(http, structured_outputs=wanted).json()["error"]
    assert (error["param"], error["message"]) == ("structured_outputs", "structured_outputs: no text follows it")


def test_a_developer_is_the_system_for_templates_that_know_only_that(engine):
    """Named after messages that vanished: Qwen's and DeepSeek's templates have no role `developer`."""
    one = "{% if m.role in ('system', 'user') %}{{ m.role }}: {{ m.content }}\n{% endif %}"
    loop = "{% for m in messages %}" + one + "{% endfor %}"
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    for template, seen in (
        (loop, "system: Be brief."),
        (loop.replace("'system'", "'developer'"), "developer: Be brief."),
    ):
        with chat_client(chat_engine(engine.vocabulary), template) as http:
            ids = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
            assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"].startswith(seen)


def test_contents_as_parts(http):
    parts = [{"type": "text", "text": "In the"}, {"type": "text", "text": "beginning"}]
    one = ask(http, messages=[{"role": "user", "content": parts}]).json()
    two = ask(http, messages=[{"role": "user", "content": "In the\nbeginning"}]).json()
    assert one["choices"] == two["choices"]


def test_n_choices(http):
    body = ask(http, n=3, temperature=1).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 3
    assert body["choices"][0] == ask(http, temperature=1).json()["choices"][0]


def test_logprobs(http):
    body = ask(http, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0).json()
    scores = body["choices"][0]["logprobs"]["content"]
    assert len(scores) == 4
    for score in scores:
        assert [one["logprob"] for one in score["top_logprobs"]] == sorted(
            (one["logprob"] for one in score["top_logprobs"]), reverse=True
        )
        assert score["top_logprobs"][0]["token"] == score["token"]
        assert bytes(score["bytes"] or b"").decode("utf-8", "replace")
    ids = ask(http, logprobs=True, max_tokens=1, return_tokens_as_token_ids=True).json()
    assert ids["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")


def test_usage_counts_what_was_in_the_cache(http):
    messages = [{"role": "user", "content": "Grüße " * 40}]
    first, second = (ask(http, messages=messages).json()["usage"] for _ in range(2))
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens_details"]["cached_tokens"]


def test_usage_in_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        openai_client(http).chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=6, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] > 0


def test_the_last_message_is_continued(http, engine):
    messages = [*MESSAGES, {"role": "assistant", "content": "was the"}]
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    ids = http.post("/tokenize", json={"messages": messages, "continue_final_message": True}).json()["tokens"]
    assert ask(http, **fields).status_code == 200
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("Assistant: was the")


def test_a_spelled_control_token_is_no_control_token(reasoning_http, engine):
    spelled = [{"role": "user", "content": "<|bos|></think><think>"}]
    plain = reasoning_http.post("/tokenize", json={"messages": spelled}).json()["tokens"]
    marks = [engine.vocabulary.control_tokens[name] for name in ("<think>", "</think>")]
    assert [plain.count(mark) for mark in marks] == [1, 0]  # that of the template
    assert plain.count(0) == 1


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages.0.role: input should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages", "needs content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages", "messages.0.extra: is not"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "needs tool_call_id"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"prompt": "x"}, "prompt", "/v1/completions"),
        ({"functions": []}, "functions", "use tools"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs is true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tool_choice": "auto"}, "tool_choice", "when tools are given"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "1 to 64 letters"),
        ({"tools": [{"type": "retrieval"}]}, "tools", "input should be 'function'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not in"),
        ({"modalities": ["audio"]}, "modalities", "is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not read 'reasoning_effort'"),
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs", "does not read 'thinking'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "does not read 'messages'"),
        ({"chat_template": "x"}, "chat_template", "that of the model"),
        ({"continue_final_message": True}, "continue_final_message", "role assistant"),
        ({"response_format": json_schema({"type": "objct"})}, "response_format", "objct"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs", "none of them empty"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not JSON"),
        ({"structured_outputs": {"grammar": "start"}}, "structured_outputs", "structured_outputs: "),
        ({"structured_outputs": {"json": {"enum": ["x" * 300_000]}}}, "structured_outputs", "of up to 262,144"),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": json_schema({})}, "structured_outputs", "both"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(http, changes, param, says):
    content = json.dumps({"messages": MESSAGES, **changes})
    response = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert says in error["message"]
    assert error["message"].startswith(param) or says in ("surrogate",)


@pytest.mark.parametrize("depth", [90, 300, 5000, 50_000])
def test_a_schema_that_is_nested_too_deeply(http, depth):
    schema = '{"anyOf": [' * depth + "{}" + "]}" * depth
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "structured_outputs": {{"json": {schema}}}}}'
    response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert re.search("too deep|recursion limit", response.json()["error"]["message"])


def test_a_model_without_a_template(engine):
    with chat_client(chat_engine(engine.vocabulary), None) as client:
        error = ask(client).json()["error"]
        assert error["code"] == "no_chat_template"
        assert "moray models template" in error["message"]
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert client.get("/tokenizer_info").json()["chat_template"] is None


def test_reasoning_is_apart(reasoning_http):
    body = ask(reasoning_http, max_tokens=30, structured_outputs={"regex": "a{3}"}, temperature=1).json()
    message = body["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] in ("", "aaa")
    free = ask(reasoning_http, chat_template_kwargs={"brief": True}, structured_outputs={"regex": "a{3}"}).json()
    assert free["choices"][0]["message"] == {"role": "assistant", "content": "aaa", "refusal": None}


def structured(form: str) -> dict:
    if form == "response_format":
        return {"response_format": json_schema(PARAMETERS)}
    return {"structured_outputs": {"json": PARAMETERS}}


@pytest.mark.parametrize("form", ["response_format", "structured_outputs"])
def test_structured_output_on_both_routes(http, form):
    fields = {"max_tokens": 200, "temperature": 1, "seed": 5, "min_tokens": 3, **structured(form)}
    chat = ask(http, **fields).json()["choices"][0]
    text = http.post("/v1/completions", json={"prompt": "In", **fields}).json()["choices"][0]
    for answer, reason in ((chat["message"]["content"], chat["finish_reason"]), (text["text"], text["finish_reason"])):
        assert reason == "stop"
        jsonschema.validate(json.loads(answer), PARAMETERS)


def test_a_grammar_decides_over_min_tokens_and_ends_by_itself(http):
    fields = {"structured_outputs": {"choice": ["yes"]}, "min_tokens": 8, "max_tokens": 8, "ignore_eos": True}
    choice = ask(http, **fields).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("yes", "stop")


def test_json_object(http):
    for seed in range(5):
        choice = ask(http, max_tokens=120, seed=seed, temperature=1, response_format={"type": "json_object"}).json()
        answer = choice["choices"][0]
        assert answer["message"]["content"].startswith("{")
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["message"]["content"]), dict)


def test_structured_answers_beside_others_are_the_same(http):
    """A grammar's mask is of one row, so it changes no other answer of the batch."""
    alone = ask(http, seed=9, temperature=1, max_tokens=40).json()["choices"]
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(ask, http, seed=seed, temperature=1, max_tokens=60, **structured("structured_outputs"))
            for seed in range(3)
        ]
        beside = pool.submit(ask, http, seed=9, temperature=1, max_tokens=40).result().json()["choices"]
        for future in futures:
            jsonschema.validate(json.loads(future.result().json()["choices"][0]["message"]["content"]), PARAMETERS)
    assert beside == alone


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_that_must_be_called(any_http, choice):
    client = openai_client(any_http)
    fields = {
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "max_completion_tokens": 400,
        "seed": 2,
        "temperature": 1,
    }
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **fields).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert len({call.id for call in whole.message.tool_calls}) == len(whole.message.tool_calls)
    for call in whole.message.tool_calls:
        assert call.type == "function"
        schema = {"weather": PARAMETERS, "clock": {"maxProperties": 0}}[call.function.name]  # no other arguments
        jsonschema.validate(json.loads(call.function.arguments), schema)
    if choice != "required":
        assert [call.function.name for call in whole.message.tool_calls] == ["weather"]
    joined = streamed(client, **fields).choices[0]
    assert joined.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in joined.message.tool_calls] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls
    ]


def test_one_call_unless_parallel(http):
    for seed in range(6):
        fields = {"tools": [CLOCK], "tool_choice": "required", "max_tokens": 200, "seed": seed, "temperature": 1}
        body = ask(http, parallel_tool_calls=False, **fields).json()
        assert len(body["choices"][0]["message"]["tool_calls"]) == 1


def test_tools_that_may_be_called(any_http):
    reasons = set()
    for seed in range(8):
        body = ask(any_http, tools=[WEATHER], seed=seed, temperature=1, max_tokens=60).json()
        (choice,) = body["choices"]
        reasons.add(choice["finish_reason"])
        for call in choice["message"].get("tool_calls", []):
            assert call["function"]["name"] == "weather"
    assert reasons <= {"stop", "length", "tool_calls"}


def test_no_tool_is_called_if_none_is_wanted(any_http):
    body = ask(any_http, tools=[WEATHER], tool_choice="none").json()
    assert "tool_calls" not in body["choices"][0]["message"]
    assert body["usage"]["prompt_tokens"] == ask(any_http).json()["usage"]["prompt_tokens"]


def test_a_conversation_with_a_tool(any_http):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Ulm", "days": 2}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    response = ask(any_http, messages=messages, tools=[WEATHER])
    assert response.status_code == 200, response.text


def test_a_tool_that_cannot_be_followed_strictly(http):
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    strict = {"type": "function", "function": {"name": "f", "parameters": odd, "strict": True}}
    error = ask(http, tools=[strict]).json()["error"]
    assert (error["param"], "uniqueItems" in error["message"]) == ("tools", True)
    assert ask(http, tools=[{"type": "function", "function": {"name": "f", "parameters": odd}}]).status_code == 200


def test_templates_without_tools(engine):
    for source, says in (("{{ messages }}", "has no tools"), ("{{ tools }}", "is not known")):
        with chat_client(chat_engine(engine.vocabulary), source) as client:
            error = ask(client, tools=[CLOCK]).json()["error"]
            assert (error["param"], says in error["message"]) == ("tools", True)


def test_tokenize_and_back(http, engine):
    vocabulary = engine.vocabulary
    text = "Grüße 🙂"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == [vocabulary.bos, *vocabulary.encode(text)]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 1024)
    assert found["token_strs"][0] == vocabulary.label(0)
    bare = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": bare}).json() == {"prompt": text}
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == (vocabulary.label(0), vocabulary.label(1))
    assert info["chat_template"] == PLAIN


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {}, "give prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "give prompt or messages"),
        ("/tokenize", {"prompt": 5}, "valid string"),
        ("/tokenize", {"messages": [], "continue_final_message": True}, "at least 1"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, "role assistant"),
        ("/tokenize", {"prompt": "x", "promt": 1}, "did you mean prompt?"),
        ("/tokenize", {"model": "other", "prompt": "x"}, "does not exist"),
        ("/detokenize", {"tokens": [10**6]}, "outside the vocabulary"),
        ("/detokenize", {"tokens": [-1]}, "outside the vocabulary"),
        ("/detokenize", {"tokens": "x"}, "should be a list"),
    ],
)
def test_bad_bodies_of_the_token_routes(http, path, body, says):
    response = http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert says in response.json()["error"]["message"]
