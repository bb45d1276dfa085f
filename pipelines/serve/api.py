"""The OpenAI-compatible HTTP application over one engine: health, models, completions.

Errors of every kind, also malformed JSON and unknown paths, are OpenAI error objects. A client that goes away
cancels what it asked for, streamed or not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from moray.pipelines.serve.async_engine import AsyncEngine, EngineStoppedError
from moray.pipelines.serve.completion import DONE, Completion, event
from moray.pipelines.serve.engine import ContextLengthError
from moray.pipelines.serve.protocol import ALIAS, ApiError, CompletionRequest, validation_error
from moray.pipelines.serve.sequence import Delta
from moray.pipelines.serve.sequence import Request as EngineRequest

_log = logging.getLogger(__name__)


def build_app(engine: AsyncEngine, name: str) -> FastAPI:
    """The application that serves `engine`'s model as `name`; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="Moray", lifespan=lifespan)
    _add_error_handlers(app)
    _add_models(app, engine, name)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not engine.alive:
            raise ApiError(503, "the engine is not running")
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        _check_model(body.model, name)
        requests = body.requests(engine.engine.vocabulary)
        _check(engine, requests)
        completion = Completion(engine.engine, name, requests)
        if not body.stream:
            return JSONResponse(await _unless_gone(http, _whole(engine, completion, requests)))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _events(engine, completion, requests, with_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    return app


def _add_models(app: FastAPI, engine: AsyncEngine, name: str) -> None:
    card = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "moray",
        "max_model_len": engine.engine.config.max_position_embeddings,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(model, name)
        return card


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _answer(validation_error(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        detail = f"{error.detail}: {request.method} {request.url.path}"
        return _answer(ApiError(error.status_code, detail, code=code))

    @app.exception_handler(EngineStoppedError)
    async def stopped(request: Request, error: EngineStoppedError) -> Response:
        return _answer(ApiError(503, str(error)))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return _answer(_unexpected(error))


def _answer(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status)


def _unexpected(error: Exception) -> ApiError:
    """Details go to the log, not to strangers."""
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed on this request ({type(error).__name__})")


def _check_model(model: str, name: str) -> None:
    if model not in (name, ALIAS):
        raise ApiError(404, f"the model {model!r} does not exist; this server has {name!r}", "model", "model_not_found")


def _check(engine: AsyncEngine, requests: Sequence[EngineRequest]) -> None:
    """Refuses what could never run, before a stream has begun."""
    try:
        for request in requests:
            engine.engine.check(request)
    except ContextLengthError as error:
        raise ApiError(400, str(error), "max_tokens", "context_length_exceeded") from error
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from error


async def _whole(engine: AsyncEngine, completion: Completion, requests: Sequence[EngineRequest]) -> dict[str, Any]:
    answers: list[list[Delta]] = [[] for _ in requests]
    async for deltas in engine.generate_many(requests):
        for index, delta in deltas:
            answers[index].append(delta)
    return completion.whole(answers)


async def _events(
    engine: AsyncEngine, completion: Completion, requests: Sequence[EngineRequest], with_usage: bool
) -> AsyncIterator[bytes]:
    """The stream; an error half-way is its last event, since the status has been sent."""
    try:
        async with aclosing(engine.generate_many(requests)) as answers:  # closed at once, not when collected
            async for deltas in answers:
                yield b"".join(completion.chunk(index, delta, with_usage) for index, delta in deltas)
    except Exception as error:
        yield event(_unexpected(error).body())
        return
    yield completion.usage_chunk() + DONE if with_usage else DONE


async def _unless_gone(http: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client disconnects."""
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
