"""From the body of a request to what the engine is asked: bounded in bytes, and away from the event loop.

Notable: an event loop serves everyone, so what grows with a body does not run there: parsing, validation, tokenising,
and building the answer. A body is bounded by what a context can hold, before it is parsed; a text by the same, before
it is tokenised. Tokenising releases Python's lock, and JSON is written in slices, so the loop has its turns. Reading
JSON holds the lock, some 45 ms for a megabyte of ids; the bound of a body bounds that too.
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
from starlette.requests import ClientDisconnect

from moray.pipelines.serve.completion import Completion
from moray.pipelines.serve.engine import ContextLengthError, Engine
from moray.pipelines.serve.protocol import (
    ApiError,
    CompletionRequest,
    check_model,
    context_length_error,
    validation_error,
)
from moray.pipelines.serve.sequence import Request as EngineRequest

_LEAST_BODY = 4 << 20  # bytes that any server takes
_CONTEXTS = 16  # of ids that a body may hold
_ID_BYTES = 8  # of JSON for an id
_DRAINED = 16 << 20  # bytes of a body that are read and forgotten, so that its sender hears the answer
_SMALL = 4096  # bytes of work that take less time than a thread takes to begin it
_THREADS = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One API call, checked: what the engine is asked, and how it is answered."""

    requests: list[EngineRequest]
    completion: Completion
    stream: bool
    with_usage: bool


class Intake:
    """Takes the calls to one engine's model, which is named `name`."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        # Two pools: who is told an answer does not wait for others' prompts.
        self._prompts = ThreadPoolExecutor(_THREADS, thread_name_prefix="prompts")
        self._answers = ThreadPoolExecutor(_THREADS, thread_name_prefix="answers")
        context = engine.config.max_position_embeddings
        self.body_bytes = max(_LEAST_BODY, _CONTEXTS * context * _ID_BYTES, engine.longest_text)

    async def call(self, http: Request) -> Call:
        """Reads a request. Raises ApiError for what cannot be answered: 413 for a body beyond `body_bytes`."""
        body = await self._read(http)
        kind = http.headers.get("content-type", "")
        return await unless_gone(http, _away(self._prompts, len(body), lambda: self.parse(body, kind)))

    async def answer(self, size: int, work: Callable[[], T]) -> T:
        """The result of building an answer of `size` bytes or so."""
        return await _away(self._answers, size, work)

    def parse(self, body: bytes, content_type: str = "application/json") -> Call:
        """The call that a body asks for. Raises ApiError naming what is wrong with it."""
        asked = _validated(_json(body, content_type))
        check_model(asked.model, self._name)
        longest, vocabulary = self._engine.longest_text, self._engine.vocabulary
        for prompt in asked.prompt:
            # Every id stands for a bounded number of bytes: so much text is too many ids, whatever it says.
            if isinstance(prompt, str) and len(prompt) > longest * vocabulary.shrinks:
                raise context_length_error(
                    f"this model's maximum context length is {self._engine.config.max_position_embeddings} tokens, "
                    f"and a prompt of {len(prompt):,} characters has more"
                )
        requests = asked.requests(vocabulary)
        _check(self._engine, requests)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return Call(requests, Completion(self._engine, self._name, requests), asked.stream, with_usage)

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
            raise ApiError(
                413, f"the body has more than the {self.body_bytes:,} bytes that a request to this model can need"
            )
        return b"".join(parts)


async def _away(pool: ThreadPoolExecutor, size: int, work: Callable[[], T]) -> T:
    """The result of work on `size` bytes or so: done in a thread unless that is little."""
    if size <= _SMALL:
        return work()
    return await asyncio.get_running_loop().run_in_executor(pool, work)


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects. The body must have been read."""
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
        return None  # which is no object, as the error says
    try:
        return json.loads(body)
    except RecursionError:
        raise ApiError(400, "the body is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # also bytes that are no UTF-8
        raise ApiError(400, f"the body is not JSON: {getattr(error, 'msg', error)}") from None


def _validated(value: Any) -> CompletionRequest:
    try:
        return CompletionRequest.model_validate(value)
    except ValidationError as error:
        raise validation_error(list(error.errors(include_url=False))) from None


def _check(engine: Engine, requests: list[EngineRequest]) -> None:
    """Refuses what could never run, before a stream has begun."""
    try:
        for request in requests:
            engine.check(request)
    except ContextLengthError as error:
        raise context_length_error(str(error)) from error
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from error
