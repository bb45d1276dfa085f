"""Conversion of HTTP request bodies to engine requests, with size limits and outside the event loop.

Notable: one event loop serves all clients, so work that grows with the size of a body runs in threads: parsing,
validation, tokenization, and building the response. The size of a body is limited before it is parsed, and the size of
a text before it is tokenized, by the length of a context. Tokenization releases the GIL and JSON is written in slices,
so the event loop can run. Parsing JSON holds the GIL, about 6 ms for a megabyte of ids, so the number of commas in a
body is limited too.
"""

from __future__ import annotations

import asyncio
import email.message
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.completion import Completion
from moray.pipelines.serve.engine import ContextLengthError, Engine
from moray.pipelines.serve.protocol import CompletionRequest, check_model, context_length_error, validation_error
from moray.pipelines.serve.request_body import LEAST_LIMIT
from moray.pipelines.serve.sequence import Request as EngineRequest

_CONTEXTS = 4  # full contexts of ids that a body may contain
_LEAST_ELEMENTS = 1 << 16  # smallest limit of ids in a body
_ID_BYTES = 8  # of JSON per id
_DRAINED = 16 << 20  # bytes of a too large body that are read and discarded, so that its sender receives the response
_SMALL = 4096  # bytes; work of this size takes less time than starting it in a thread
_THREADS = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """A validated API call: the engine's requests, and the form of the response."""

    requests: list[EngineRequest]
    completion: Completion
    stream: bool
    with_usage: bool


class Intake:
    """Reads the API calls for one engine's model, which is served as `name`."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        # Two pools, so that responses do not wait for other clients' prompts.
        self._prompts = ThreadPoolExecutor(_THREADS, thread_name_prefix="prompts")
        self._answers = ThreadPoolExecutor(_THREADS, thread_name_prefix="answers")
        context = engine.config.max_position_embeddings
        self.body_bytes = max(LEAST_LIMIT, _CONTEXTS * context * _ID_BYTES, engine.longest_text)

    async def call(self, http: Request) -> Call:
        """Reads and validates a request. Raises ApiError; status 413 for a body of more than `body_bytes`."""
        body = await self._read(http)
        kind = http.headers.get("content-type", "")
        return await unless_gone(http, _in_thread(self._prompts, len(body), lambda: self.parse(body, kind)))

    async def answer(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, which builds a response of about `size` bytes."""
        return await _in_thread(self._answers, size, work)

    def parse(self, body: bytes, content_type: str = "application/json") -> Call:
        """Parses and validates a body. Raises ApiError."""
        most = max(_LEAST_ELEMENTS, _CONTEXTS * self._engine.config.max_position_embeddings)
        if body.count(b",") > most:  # each of them costs the parser some 30 ns, in which no other thread runs
            raise ApiError(413, f"the body has more than {most:,} commas, the limit for requests to this model")
        parsed = _validated(_json(body, content_type))
        check_model(parsed.model, self._name)
        longest, vocabulary = self._engine.longest_text, self._engine.vocabulary
        for prompt in parsed.prompt:
            # An id stands for a bounded number of bytes, so a text of this size has too many ids.
            if isinstance(prompt, str) and len(prompt) > longest * vocabulary.shrinks:
                raise context_length_error(
                    f"this model's maximum context length is {self._engine.config.max_position_embeddings} tokens, "
                    f"and a prompt of {len(prompt):,} characters has more"
                )
        requests = parsed.requests(vocabulary)
        _check(self._engine, requests[:: parsed.n])  # the choices of a prompt differ by their seeds
        with_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
        return Call(requests, Completion(self._engine, self._name, requests, parsed.n), parsed.stream, with_usage)

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
        return None  # validation then reports that the body is not an object
    try:
        return from_json(body)
    except ValueError:  # invalid, or an escape of half a character, which the slower parser reads
        pass
    try:
        return json.loads(body)
    except RecursionError:
        raise ApiError(400, "the JSON of the body is nested too deeply") from None
    except ValueError as error:  # also for invalid UTF-8
        raise ApiError(400, f"the body is not JSON: {getattr(error, 'msg', error)}") from None


def _validated(value: Any) -> CompletionRequest:
    try:
        return CompletionRequest.model_validate(value)
    except ValidationError as error:
        raise validation_error(list(error.errors(include_url=False))) from None


def _check(engine: Engine, requests: list[EngineRequest]) -> None:
    """Raises ApiError for an invalid request before a stream starts."""
    try:
        for request in requests:
            engine.check(request)
    except ContextLengthError as error:
        raise context_length_error(str(error)) from error
    except ValueError as error:
        field = str(error).partition(":")[0]
        raise ApiError(400, str(error), field if field in CompletionRequest.model_fields else "prompt") from error
