"""The OpenAI-compatible HTTP application of one engine: health, models, completions, chat, tokens.

All errors, including malformed JSON and unknown paths, are OpenAI error objects. If a client disconnects, its requests
are cancelled, streamed or not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moray.pipelines.serve.api_error import ApiError, queue_full
from moray.pipelines.serve.api_response import ApiResponse, response_json
from moray.pipelines.serve.async_engine import AsyncEngine, EngineStoppedError, QueueFullError, Reservation
from moray.pipelines.serve.chat_prompt import Chat
from moray.pipelines.serve.chat_request import ChatRequest
from moray.pipelines.serve.completion_request import CompletionRequest
from moray.pipelines.serve.embeddings import EmbeddingsRequest
from moray.pipelines.serve.gateway import VERSION
from moray.pipelines.serve.grammar import GrammarError
from moray.pipelines.serve.intake import Call, Intake, unless_gone
from moray.pipelines.serve.interpreter import CollectsWhenCalm, serving_interpreter
from moray.pipelines.serve.key_check import KeyCheck, KeyRequired, check_quota, key_of
from moray.pipelines.serve.metrics import CONTENT_TYPE, as_text, publish_metrics
from moray.pipelines.serve.protocol import check_model
from moray.pipelines.serve.report import RequestTally, ServingReport
from moray.pipelines.serve.request_body import LIMIT
from moray.pipelines.serve.responses_request import ResponsesRequest
from moray.pipelines.serve.sequence import Delta
from moray.pipelines.serve.token_routes import DetokenizeRequest, TokenizeRequest, detokenize, tokenize, tokenizer_info
from moray.platform.core.api_keys import ApiKey
from moray.platform.core.serving import ServedModel

_log = logging.getLogger(__name__)
_UNLIMITED_SHARE = 16  # of a key's tokens per minute: what a request counts for that does not say how many it wants


def build_serving_app(
    engine: AsyncEngine,
    name: str,
    version: str = "",
    report: ServingReport | None = None,
    chat: Chat | None = None,
    keys: KeyCheck | None = None,
    replica: str = "",
) -> FastAPI:
    """The application that serves `engine`'s model as `name`; its lifespan starts and stops the engine and its report.
    chat: the model's chat form. keys: that requests need; by default none. replica: its id in Ray Serve, if
    it publishes its metrics for all proxies of the cluster.

    Responses name the version of the deployment in a header, except those of a replica that is stopping: without the
    header, the gateway asks another replica.
    """

    intake = Intake(engine.engine, name, chat)
    report = report or ServingReport(ServedModel(folder="", name=name), engine, "")
    keys = keys or KeyCheck()
    answering = _Answering(engine, intake, report, keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        report.start()
        publishing = asyncio.create_task(publish_metrics(replica, report.collect)) if replica else None
        with serving_interpreter():
            yield
        if publishing:
            publishing.cancel()
        await asyncio.to_thread(engine.stop)
        await asyncio.to_thread(report.close)

    app = FastAPI(title="Moray", lifespan=lifespan)
    app.add_middleware(KeyRequired, keys=keys)
    app.add_middleware(_Versioned, engine=engine, version=version)
    app.add_middleware(CollectsWhenCalm)
    _add_error_handlers(app, engine, version)
    _add_models(app, engine, name, intake)

    @app.get("/health")
    @app.get("/ready")
    async def health() -> dict[str, str]:
        if not engine.alive:
            raise ApiError(503, "the engine is not running")
        return {"status": "ok", **({"notice": engine.engine.notice} if engine.engine.notice else {})}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(as_text(report.collect()), media_type=CONTENT_TYPE)

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def completions(http: Request) -> Response:
        return await answering.respond(http, intake.completion)

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chats(http: Request) -> Response:
        return await answering.respond(http, intake.chat)

    @app.post("/v1/responses", openapi_extra=_body(ResponsesRequest))
    async def responses(http: Request) -> Response:
        return await answering.respond(http, intake.response)

    @app.post("/v1/embeddings", openapi_extra=_body(EmbeddingsRequest))
    async def embeddings(http: Request) -> Response:
        return await answering.respond(http, intake.embeddings)

    _add_tokens(app, engine, intake)
    _define(app)
    return app


def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    return kind.model_json_schema(ref_template="#/components/schemas/{model}")


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    """Schema of a body in /openapi.json, because bodies are parsed here and not by FastAPI."""
    schema = {key: part for key, part in _schema(kind).items() if key != "$defs"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _define(app: FastAPI) -> None:
    """Adds to /openapi.json what the schemas of bodies refer to."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        found = generate()
        for kind in (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest):
            found.setdefault("components", {}).setdefault("schemas", {}).update(_schema(kind).get("$defs", {}))
        return found

    app.openapi = openapi  # type: ignore[method-assign]


class _Stream(StreamingResponse):
    """A stream that releases its room in the queue and ends its tally, also if its client is gone before it begins."""

    def __init__(self, content: AsyncIterator[bytes], room: Reservation, tally: RequestTally, **settings: Any) -> None:
        super().__init__(content, **settings)
        self._room, self._tally = room, tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._room.release()
            self._tally.leave()


@dataclass(frozen=True)
class _Answering:
    """What answers a request: the engine, within the limits of keys, and counted by the report."""

    engine: AsyncEngine
    intake: Intake
    report: ServingReport
    keys: KeyCheck

    async def respond(self, http: Request, read: Callable[[bytes, str], Call]) -> Response:
        """The response to a request for answers, whole or streamed. read: parses its body."""
        key = key_of(http.scope)
        try:
            tenant = key.name if key else ""
            first = self.engine.reserve_room(tenant, 1)  # before the body is read, so that refusals cost little
            try:
                call = (await self.intake.read(http, read)).of_tenant(tenant)
            finally:
                first.release()
            room = self.engine.reserve(call.requests)
        except (ApiError, QueueFullError):
            self.report.refuse()
            raise
        try:
            return await self._reserved(http, call, key, room)
        except BaseException:
            room.release()
            raise

    async def _reserved(self, http: Request, call: Call, key: ApiKey | None, room: Reservation) -> Response:
        """The response to a request for which there is room."""
        try:
            headers = await self._take(key, call)
        except ApiError:
            self.report.refuse()
            raise
        tally = self.report.request(
            call.response.prompt_tokens, key.name if key else "", partial(self._give, key, call)
        )
        if not call.stream:
            body = await unless_gone(http, _whole(self.engine, self.intake, call, tally))
            room.release()
            return Response(body, media_type="application/json", headers=headers)
        return _Stream(
            _events(self.engine, self.intake, call, tally),
            room,
            tally,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
        )

    async def _take(self, key: ApiKey | None, call: Call) -> dict[str, str]:
        """Takes a request and its tokens from a key's limits. Returns headers of the response. Raises ApiError."""
        if key is None:
            return {}
        tokens = call.response.prompt_tokens + _expected(key, call)
        quota = await self.keys.meter.take(key, tokens)
        check_quota(quota, tokens)
        return quota.headers

    def _give(self, key: ApiKey | None, call: Call, generated: int | None) -> None:
        """Gives back what a request did not generate; everything, if it is asked again elsewhere (None)."""
        if key is not None:
            unused = call.response.prompt_tokens if generated is None else -generated
            self.keys.meter.give(key, _expected(key, call) + unused)


def _expected(key: ApiKey, call: Call) -> int:
    """The tokens that a request takes from its key's limit for its answer, until it ends."""
    return min(call.most, key.tokens // _UNLIMITED_SHARE) if call.unlimited else call.most


class _Versioned:
    """ASGI middleware that adds the version to responses while the engine runs."""

    def __init__(self, app: ASGIApp, engine: AsyncEngine, version: str) -> None:
        self._app, self._engine = app, engine
        self._header = (VERSION, version.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def versioned(message: Message) -> None:
            if message["type"] == "http.response.start" and self._engine.alive:
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._app(scope, receive, versioned)


def _add_models(app: FastAPI, engine: AsyncEngine, name: str, intake: Intake) -> None:
    card = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "moray",
        "max_model_len": engine.engine.config.max_position_embeddings,
        LIMIT: intake.body_bytes,
        "chat_template": intake.chat_form.kind,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model, name)
        return card


def _add_tokens(app: FastAPI, engine: AsyncEngine, intake: Intake) -> None:
    @app.post("/tokenize", openapi_extra=_body(TokenizeRequest))
    async def tokenizing(http: Request) -> Response:
        found = await intake.read(http, partial(tokenize, engine.engine, intake))
        return Response(
            await intake.answer(8 * found["count"], partial(response_json, found)), media_type="application/json"
        )

    @app.post("/detokenize", openapi_extra=_body(DetokenizeRequest))
    async def detokenizing(http: Request) -> dict[str, str]:
        return await intake.read(http, partial(detokenize, engine.engine, intake))

    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        return tokenizer_info(engine.engine.vocabulary, intake.chat_form)


def _add_error_handlers(app: FastAPI, engine: AsyncEngine, version: str) -> None:
    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        detail = f"{error.detail}: {request.method} {path:.200}"
        return ApiError(error.status_code, detail, code=code, headers=error.headers).response()

    @app.exception_handler(EngineStoppedError)
    async def stopped(request: Request, error: EngineStoppedError) -> Response:
        return ApiError(503, str(error)).response()

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> Response:
        return queue_full(str(error), error.entirely).response()

    @app.exception_handler(GrammarError)
    async def complex_grammar(request: Request, error: GrammarError) -> Response:
        return _unexpected(error).response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        response = _unexpected(error).response()  # outside of all middleware
        if engine.alive:  # not to be sent to another replica, where it would fail too
            response.headers[VERSION.decode()] = version
        return response


def _unexpected(error: Exception) -> ApiError:
    """The error for clients; its details are only logged."""
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error))
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), code="grammar_too_complex")
    _log.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed on this request ({type(error).__name__})")


async def _whole(engine: AsyncEngine, intake: Intake, call: Call, tally: RequestTally) -> bytes:
    answers: list[list[Delta]] = [[] for _ in call.requests]
    size = 0
    with tally:
        async for deltas in engine.generate_many(call.requests, reserved=True):
            tally.add(deltas)
            for index, delta in deltas:
                answers[index].append(delta)
                size += _size(delta)
        return await intake.answer(size, lambda: response_json(call.response.whole(answers)))


async def _events(engine: AsyncEngine, intake: Intake, call: Call, tally: RequestTally) -> AsyncIterator[bytes]:
    """The events of a stream. A late error becomes its last event, because the status is already sent."""
    try:
        # Closed now, not by garbage collection.
        async with aclosing(engine.generate_many(call.requests, reserved=True)) as answers:
            with tally:
                async for deltas in answers:
                    tally.add(deltas)
                    size = sum(_size(delta) for _, delta in deltas)
                    yield await intake.answer(size, partial(_chunks, call.response, deltas))
    except Exception as error:
        yield call.response.failure(_unexpected(error))
        return
    yield call.response.end()


def _chunks(response: ApiResponse, deltas: Sequence[tuple[int, Delta]]) -> bytes:
    return b"".join(response.chunk(index, delta) for index, delta in deltas)


def _size(delta: Delta) -> int:
    """Approximate bytes of JSON; a scored token takes about 200."""
    scored = bool(delta.tokens) and delta.tokens[-1].logprob is not None
    return len(delta.text) + (200 * len(delta.tokens) if scored else 0)
