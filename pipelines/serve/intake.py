"""Conversion of HTTP request bodies to engine requests, with size limits and outside the event loop.

Notable: one event loop serves all clients, so work that grows with the size of a body runs in threads: parsing,
validation, templates, tokenization, grammars, and building the response. The size of a body is limited before it is
parsed, and the size of a text before it is tokenized, by the length of a context. Tokenization releases the GIL and
JSON is written in slices, so the event loop can run. Parsing JSON holds the GIL, about 6 ms for a megabyte of ids, so
the number of commas in a body is limited too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.message
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.api_response import ApiResponse
from moray.pipelines.serve.chat_prompt import Chat
from moray.pipelines.serve.chat_request import ChatRequest
from moray.pipelines.serve.chat_response import ChatResponse
from moray.pipelines.serve.completion_request import CompletionRequest, prompt_fields
from moray.pipelines.serve.completion_response import CompletionResponse
from moray.pipelines.serve.embeddings import EmbeddingsRequest, EmbeddingsResponse
from moray.pipelines.serve.engine import ContextLengthError, Engine
from moray.pipelines.serve.grammar import Grammar, GrammarCompiler, GrammarError, GrammarText
from moray.pipelines.serve.protocol import AnswerFields, check_model, choices, context_length_error, validation_error
from moray.pipelines.serve.request_body import LEAST_LIMIT
from moray.pipelines.serve.responses_request import FIELDS, ResponsesRequest
from moray.pipelines.serve.responses_response import ResponsesResponse
from moray.pipelines.serve.sequence import Request as EngineRequest

_CONTEXTS = 4  # full contexts of ids that a body may contain
_LEAST_ELEMENTS = 1 << 16  # smallest limit of ids in a body
_ID_BYTES = 8  # of JSON per id
_DRAINED = 16 << 20  # bytes of a too large body that are read and discarded, so that its sender receives the response
_SMALL = 4096  # bytes; work of this size takes less time than starting it in a thread
_THREADS = 2
_GRAMMARS = (b"response_format", b"structured_outputs", b"tools")  # fields whose compilation may take long

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Call:
    """A validated API call: the engine's requests, and the form of the response. most: tokens
    that it may generate, in all choices. unlimited: whether it did not say how many."""

    requests: list[EngineRequest]
    response: ApiResponse
    stream: bool
    most: int
    unlimited: bool = False

    def of_tenant(self, tenant: str) -> Call:
        """The call, by whom the engine's work is shared fairly."""
        return dataclasses.replace(self, requests=[dataclasses.replace(one, tenant=tenant) for one in self.requests])


class Intake:
    """Reads the API calls for one engine's model, which is served as `name`. chat: the model's chat form."""

    def __init__(self, engine: Engine, name: str, chat: Chat | None = None) -> None:
        self._engine = engine
        self._name = name
        self.chat_form = chat or Chat(engine.vocabulary)
        self._grammars = GrammarCompiler(engine.vocabulary)
        # Pools of their own, so that responses do not wait for other clients' prompts, nor prompts for grammars.
        self._prompts = ThreadPoolExecutor(_THREADS, thread_name_prefix="prompts")
        self._compiling = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammars")
        self._answers = ThreadPoolExecutor(_THREADS, thread_name_prefix="answers")
        context = engine.config.max_position_embeddings
        self.body_bytes = max(LEAST_LIMIT, _CONTEXTS * context * _ID_BYTES, engine.longest_text)

    async def read(self, http: Request, work: Callable[[bytes, str], T]) -> T:
        """The result of `work` on a request's body and its content type, in a thread. Raises ApiError; status 413 for a
        body of more than `body_bytes`."""
        body = await self._read(http)
        kind = http.headers.get("content-type", "")
        long = any(name in body for name in _GRAMMARS)
        pool, size = (self._compiling, _SMALL + 1) if long else (self._prompts, len(body))
        return await unless_gone(http, _in_thread(pool, size, lambda: work(body, kind)))

    async def answer(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, which builds a response of about `size` bytes."""
        return await _in_thread(self._answers, size, work)

    def completion(self, body: bytes, content_type: str = "application/json") -> Call:
        """Parses and validates a body of /v1/completions. Raises ApiError."""
        parsed = self.parse(body, content_type, CompletionRequest)
        for prompt in parsed.prompt:
            if isinstance(prompt, str):
                self.check_length(len(prompt))
        grammar = self._compiled(_answer_text(parsed), parsed)
        prompts = [_with_grammar(one, grammar) for one in parsed.prompts(self._engine.vocabulary)]
        self._check(prompts, type(parsed))
        requests = [choice for prompt in prompts for choice in choices(prompt, parsed)]
        by_id = parsed.return_tokens_as_token_ids
        response = CompletionResponse(self._engine, self._name, requests, parsed.n, parsed.stream_options, by_id)
        return Call(requests, response, parsed.stream, parsed.max_tokens * len(requests))

    def chat(self, body: bytes, content_type: str = "application/json") -> Call:
        """Parses and validates a body of /v1/chat/completions. Raises ApiError."""
        return self._chat(self.parse(body, content_type, ChatRequest), ChatResponse)

    def response(self, body: bytes, content_type: str = "application/json") -> Call:
        """Parses and validates a body of /v1/responses. Raises ApiError."""
        parsed = self.parse(body, content_type, ResponsesRequest)
        try:
            chat = parsed.chat()
        except ValidationError as error:
            raise validation_error(list(error.errors(include_url=False)), ChatRequest).renamed(FIELDS) from None
        try:
            return self._chat(chat, partial(ResponsesResponse, parsed))
        except ApiError as error:
            raise error.renamed(FIELDS) from None

    def embeddings(self, body: bytes, content_type: str = "application/json") -> Call:
        """Parses and validates a body of /v1/embeddings. Raises ApiError."""
        parsed = self.parse(body, content_type, EmbeddingsRequest)
        requests = []
        for prompt in parsed.input:
            if isinstance(prompt, str):
                self.check_length(len(prompt))
            fields = prompt_fields(prompt, self._engine.vocabulary, "input")
            requests.append(EngineRequest(**fields, max_tokens=0, temperature=0.0, embed=True))
        try:
            self._check(requests, CompletionRequest)
        except ApiError as error:
            raise ApiError(error.status, error.message.replace("prompt", "input"), "input", error.code) from error
        response = EmbeddingsResponse(self._engine, self._name, requests, parsed.encoding_format)
        return Call(requests, response, stream=False, most=0)

    def _chat(self, parsed: ChatRequest, respond: Callable[..., ApiResponse]) -> Call:
        self.check_length(sum(len(message.content or "") for message in parsed.messages))
        prompt = self.chat_form.prompt(parsed, _answer_text(parsed))
        ids = self.rendered_ids(prompt.text, prompt.mark)
        room = self._engine.room(len(ids))
        request = EngineRequest(
            prompt=ids,
            bare=True,
            max_tokens=max(1, room) if parsed.limit is None else parsed.limit,
            logprobs=parsed.top_logprobs if parsed.logprobs else None,
            grammar=self._compiled(prompt.grammar, parsed),
            shown=frozenset(self._engine.vocabulary.control_tokens[name] for name in prompt.shown),
            **parsed.sampling(self._engine.vocabulary),
        )
        self._check([request], type(parsed))
        requests = choices(request, parsed)
        by_id = parsed.return_tokens_as_token_ids
        response = respond(self._engine, self._name, requests, prompt, parsed.stream_options, by_id)
        most = sum(one.max_tokens for one in requests)
        return Call(requests, response, parsed.stream, most, unlimited=parsed.limit is None)

    def parse(self, body: bytes, content_type: str, kind: type[Body]) -> Body:
        """A body as an object of the type `kind`, for the served model. Raises ApiError."""
        most = max(_LEAST_ELEMENTS, _CONTEXTS * self._engine.config.max_position_embeddings)
        if body.count(b",") > most:  # each of them costs the parser some 30 ns, in which no other thread runs
            raise ApiError(413, f"the body has more than {most:,} commas, the limit for requests to this model")
        try:
            parsed = kind.model_validate(_json(body, content_type))
        except ValidationError as error:
            raise validation_error(list(error.errors(include_url=False)), kind) from None
        except RecursionError:
            raise ApiError(400, "the JSON of the body is nested too deeply") from None
        check_model(getattr(parsed, "model", self._name), self._name)
        return parsed

    def check_length(self, characters: int) -> None:
        """Raises ApiError for a text of so many characters that it has too many ids, because an id stands for a bounded
        number of bytes."""
        if characters > self._engine.longest_text * self._engine.vocabulary.shrinks:
            raise context_length_error(
                f"this model's maximum context length is {self._engine.config.max_position_embeddings} tokens, "
                f"and a prompt of {characters:,} characters has more"
            )

    def rendered(self, request: ChatRequest) -> tuple[int, ...]:
        """The ids of a chat's prompt. Raises ApiError."""
        return self.rendered_ids(*self.chat_form.render(request))

    def rendered_ids(self, text: str, mark: str) -> tuple[int, ...]:
        self.check_length(len(text))
        try:
            return tuple(self._engine.vocabulary.encode_rendered(text, mark))
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", "messages") from error

    def _compiled(self, text: GrammarText | None, parsed: AnswerFields) -> Grammar | None:
        """Raises ApiError that names the field."""
        if text is None:
            return None
        field = "response_format" if parsed.response_format else "structured_outputs"
        if parsed.structured_outputs is None and getattr(parsed, "tools", None):
            field = "tools"
        try:
            return self._grammars.compile(text)
        except GrammarError as error:
            raise ApiError(400, f"{field}: {error}", field) from error

    def _check(self, requests: list[EngineRequest], kind: type[AnswerFields]) -> None:
        """Raises ApiError for an invalid request before a stream starts."""
        prompt = "messages" if kind is ChatRequest else "prompt"
        try:
            for request in requests:
                self._engine.check(request)
        except ContextLengthError as error:
            raise context_length_error(str(error)) from error
        except ValueError as error:
            field = str(error).partition(":")[0]
            raise ApiError(400, str(error), field if field in kind.model_fields else prompt) from error

    async def _read(self, http: Request) -> bytes:
        parts, size = [], 0
        try:
            async for part in http.stream():
                size += len(part)
                if size <= self.body_bytes:
                    parts.append(part)
                    continue
                parts.clear()
                if size > _DRAINED:
                    break
        except ClientDisconnect:
            raise ApiError(499, "the client closed the connection") from None
        if size > self.body_bytes:
            raise ApiError(413, f"the body exceeds {self.body_bytes:,} bytes, the limit for requests to this model")
        return b"".join(parts)


async def _in_thread(pool: ThreadPoolExecutor, size: int, work: Callable[[], T]) -> T:
    """The result of `work` on about `size` bytes. Small work runs directly, without a thread."""
    if size <= _SMALL:
        return work()
    return await asyncio.get_running_loop().run_in_executor(pool, work)


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`. Cancels it if the client disconnects. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _json(body: bytes, content_type: str) -> Any:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    if message.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        given = f"not {content_type:.80}" if content_type else "which this request has not"
        raise ApiError(400, f"the body must be sent as Content-Type: application/json, {given}")
    try:
        return from_json(body)
    except ValueError:  # invalid, or an escape of half a character, which the slower parser reads
        pass
    try:
        return json.loads(body)
    except RecursionError:
        raise ApiError(400, "the JSON of the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not JSON: {where}: {error.msg}") from None
    except ValueError as error:  # invalid UTF-8, or a number of thousands of digits
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number has too many digits"
        raise ApiError(400, f"the body is not JSON: {reason}") from None


def _answer_text(parsed: AnswerFields) -> GrammarText | None:
    """What the answer's content must follow; None for any text. Raises ApiError."""
    given = parsed.structured_outputs or parsed.response_format
    field = "structured_outputs" if parsed.structured_outputs else "response_format"
    try:
        return given.grammar() if given else None
    except RecursionError:
        raise ApiError(400, f"{field}: the schema is nested too deeply", field) from None
    except GrammarError as error:
        raise ApiError(400, f"{field}: {error}", field) from error


def _with_grammar(request: EngineRequest, grammar: Grammar | None) -> EngineRequest:
    return request if grammar is None else dataclasses.replace(request, grammar=grammar)
