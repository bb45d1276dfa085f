"""Clients of OpenAI's API against a server, for benchmarks/api_conformance.py.

Usage: python api_clients.py URL MODEL FUZZ_CASES
Writes one JSON line: by client, the number of its cases, and those that went wrong.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

LONG = 20_000  # ids, more than the context of the model
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
MESSAGES = [{"role": "user", "content": "In the beginning"}]
# Bodies of /v1/completions, beside a prompt of their own or "In the beginning", and the fields that the errors name.
GOOD: list[dict[str, Any]] = [
    {}, {"prompt": [5, 6, 7]}, {"prompt": ["a", "b"]}, {"prompt": [[5, 6], [7]]}, {"n": 2},
    {"seed": -3}, {"logprobs": 3}, {"logprobs": 0}, {"max_tokens": 0, "echo": True, "logprobs": 1},
    {"stop": "e"}, {"stop": ["and the", "and"]}, {"user": "x", "store": True, "metadata": {"a": "b"}},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}, {"logit_bias": {"5": -100}},
    {"top_k": 20, "min_p": 0.1, "top_p": 0.9, "temperature": 1.3}, {"min_tokens": 4}, {"stop_token_ids": [5]},
    {"response_format": {"type": "json_object"}, "max_tokens": 64}, {"structured_outputs": {"regex": "[a-c]{3}"}},
    {"structured_outputs": {"choice": ["yes", "no"]}}, {"structured_outputs": {"json": SCHEMA}, "max_tokens": 64},
    {"structured_outputs": {"grammar": 'start: "a" | "b"'}}, {"best_of": 1}, {"suffix": None}, {"cache_salt": "s"},
    {"return_tokens_as_token_ids": True, "logprobs": 1}, {"prompt": "a\x00b\x1b[31m"}, {"prompt": "🙂世界 café नमस्ते"},
]  # fmt: skip
BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"max_tokens": "8"}, 400, "max_tokens"), ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 8.0}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"), ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": -1}, 400, "temperature"), ({"temperature": 3}, 400, "temperature"), ({"top_p": 2}, 400, "top_p"),
    ({"stream": "yes"}, 400, "stream"), ({"stop": 5}, 400, "stop"), ({"stop": ["a"] * 5}, 400, "stop"),
    ({"seed": 1.5}, 400, "seed"), ({"seed": 2**64}, 400, "seed"), ({"echo": "no"}, 400, "echo"),
    ({"logprobs": 99}, 400, "logprobs"), ({"logprobs": True}, 400, "logprobs"), ({"model": 5}, 400, "model"),
    ({"model": "gpt-4"}, 404, "model"), ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"temperature_": 1}, 400, "temperature_"), ({"foo": 1}, 400, "foo"), ({"guided_json": {}}, 400, "guided_json"),
    ({"suffix": "end"}, 400, "suffix"), ({"best_of": 3}, 400, "best_of"), ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"), ({"prompt": [10**6]}, 400, "prompt"), ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [1.5]}, 400, "prompt"), ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": ["x"] * 200}, 400, "prompt"), ({"prompt": [5] * LONG}, 400, "max_tokens"),
    ({"prompt": 5}, 400, "prompt"),
    ({"n": 0}, 400, "n"), ({"n": 1000}, 400, "n"), ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"structured_outputs": {"regex": "("}}, 400, "structured_outputs"),
    ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, 400, "structured_outputs"),
    ({"structured_outputs": {}}, 400, "structured_outputs"),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
]  # fmt: skip
# Bodies that are no JSON object of a request, and their statuses.
RAW: list[tuple[bytes, int]] = [
    (b"{", 400), (b"", 400), (b"[1]", 400), (b'{"prompt": NaN}', 400), (b"\xff\xfe", 400),
    (b'{"prompt": "\\ud800"}', 400), (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    (b'{"prompt": "a", "temperature": Infinity}', 400), (b'{"prompt": [' + b"5," * 3_000_000 + b"5]}", 413),
    (b'{"prompt": "' + b"a" * 20_000_000 + b'"}', 413), (b'{"prompt": "a", "prompt": "b", "max_tokens": 2}', 200),
]  # fmt: skip


class Cases:
    """Counts cases, and keeps what went wrong."""

    def __init__(self) -> None:
        self.count, self.wrong = 0, list[str]()

    def run(self, name: str, case: Callable[[], Any]) -> None:
        """A case is wrong if it raises, or returns False."""
        self.count += 1
        try:
            if case() is False:
                self.wrong.append(name)
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])

    def told(self) -> dict[str, Any]:
        return {"cases": self.count, "wrong": self.wrong}


def openai_cases(url: str, model: str) -> Cases:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    cases = Cases()

    def complete(**fields: Any) -> Any:
        body = {"model": model, "prompt": "In the beginning", "max_tokens": 8, "temperature": 0, **fields}
        return client.post("/completions", body=body, cast_to=openai.types.Completion)

    def refused(status: int, param: str, fields: dict[str, Any]) -> bool:
        try:
            complete(**fields)
        except openai.APIStatusError as error:
            return (error.status_code, error.param) == (status, param)
        return False

    def streamed(fields: dict[str, Any]) -> bool:
        body = {"model": model, "prompt": "In the beginning", "max_tokens": 40, "temperature": 1, "seed": 5, **fields}
        chunks = client.completions.create(**body, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks) == complete(**body).choices[0].text

    for fields in GOOD:
        cases.run(f"good {fields}", lambda fields=fields: bool(complete(**fields).choices))
    for fields, status, param in BAD:
        cases.run(f"bad {str(fields)[:80]}", lambda a=(status, param, fields): refused(*a))
    for fields in ({}, {"stop": "th"}, {"prompt": "🙂世界 ", "temperature": 2}, {"top_p": 0.5}):
        cases.run(f"stream of {fields}", lambda fields=fields: streamed(fields))
    for body, status in RAW:
        cases.run(f"raw {body[:40]!r}", lambda a=(url, body, status): post(*a))
    chat_cases(client, model, cases)
    return cases


def chat_cases(client: openai.OpenAI, model: str, cases: Cases) -> None:
    """Of chats, responses, and other routes."""
    fields: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 24, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    create = client.chat.completions.create
    cases.run("models", lambda: [one.id for one in client.models.list()] == [model])
    cases.run("model", lambda: client.models.retrieve(model).id == model)
    cases.run("chat", lambda: create(**fields).choices[0].message.role == "assistant")
    cases.run("chat logprobs", lambda: create(**fields, logprobs=True, top_logprobs=3).choices[0].logprobs is not None)
    cases.run("chat schema", lambda: "city" in json.loads(create(**fields | {"max_completion_tokens": 90}, response_format=form).choices[0].message.content))  # fmt: skip # noqa: E501
    cases.run("chat stream", lambda: list(create(**fields, stream=True))[-1].choices[0].finish_reason is not None)
    responses = client.responses.create
    cases.run("responses", lambda: responses(model=model, input="In the", max_output_tokens=8).object == "response")
    cases.run("responses stream", lambda: list(responses(model=model, input="x", max_output_tokens=8, stream=True))[-1].type.startswith("response."))  # fmt: skip # noqa: E501

    def called() -> bool:
        answer = create(**fields | {"max_completion_tokens": 120}, tools=[TOOL], tool_choice="required").choices[0]
        return answer.message.tool_calls[0].function.name == "weather" if answer.message.tool_calls else False

    cases.run("tool", called)


def post(url: str, body: bytes, status: int) -> bool:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        told = json.loads(response.read())
        return response.status == status and (status == 200 or bool(told["error"]["message"]))
    finally:
        connection.close()


def litellm_cases(url: str, model: str) -> Cases:
    import litellm

    cases, where = Cases(), {"api_base": f"{url}/v1", "api_key": "none"}
    chat = {"model": f"openai/{model}", "messages": MESSAGES, "max_tokens": 16, **where}
    cases.run("chat", lambda: bool(litellm.completion(**chat).choices))
    cases.run("stream", lambda: len(list(litellm.completion(**chat, stream=True))) > 1)
    cases.run("text", lambda: bool(litellm.text_completion(model=f"text-completion-openai/{model}", prompt="In the", max_tokens=8, **where).choices))  # fmt: skip # noqa: E501
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    cases.run("schema", lambda: "city" in json.loads(litellm.completion(**chat | {"max_tokens": 90}, response_format=form).choices[0].message.content))  # fmt: skip # noqa: E501
    return cases


def langchain_cases(url: str, model: str) -> Cases:
    from langchain_openai import ChatOpenAI, OpenAI

    cases, where = Cases(), {"base_url": f"{url}/v1", "api_key": "none", "model": model, "max_retries": 0}
    chat = ChatOpenAI(**where, max_completion_tokens=90)
    cases.run("invoke", lambda: chat.invoke("In the beginning").type == "ai")
    cases.run("stream", lambda: len(list(chat.stream("In the beginning"))) > 1)
    cases.run("batch", lambda: len(chat.batch(["a", "b", "c"])) == 3)
    cases.run("completion", lambda: isinstance(OpenAI(**where, max_tokens=8).invoke("In the"), str))
    structured = chat.with_structured_output({**SCHEMA, "title": "city"}, method="json_schema")
    cases.run("structured", lambda: "city" in structured.invoke("Where?"))
    again = ChatOpenAI(**where, use_responses_api=True, max_completion_tokens=8)
    cases.run("responses", lambda: again.invoke("In the").type == "ai")
    return cases


def fuzzed(url: str, count: int) -> Cases:
    """schemathesis on /openapi.json: how often the server failed or broke its own description."""
    cases = Cases()
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--url", url,
        "--checks", "not_a_server_error", "--max-examples", str(count), "--continue-on-failure", "--no-color",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # schemathesis keeps files in the current one
        run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    made = re.search(r"([\d,]+) generated", run.stdout)
    cases.count = int(made[1].replace(",", "")) if made else 0
    if run.returncode:
        cases.wrong.append(run.stdout[-2000:])
    return cases


def main(url: str, model: str, count: int) -> None:
    found = {
        "openai": openai_cases(url, model), "litellm": litellm_cases(url, model),
        "langchain-openai": langchain_cases(url, model), "schemathesis": fuzzed(url, count),
    }  # fmt: skip
    print(json.dumps({name: cases.told() for name, cases in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
