"""The gateway: ASGI middleware in Ray Serve's proxies that sends each request to the deployment of its model.

    /v1/completions with "model": "NAME"    ->  /NAME/v1/completions
    /NAME/v1/...                            ->  as it is
    anything else                           ->  the only deployment, if there is exactly one

Each deployment is a Serve application at the route /NAME, so Serve's own route table is the list of models. The gateway
runs in the proxy's process, because a separate ingress deployment would add a process between proxy and engine: with
eight clients, that reduced the rate from 5,800 to 1,100 streamed chunks per second.

A request whose replica dies before the first byte of its response is sent again, to another replica. A stream that is
cut later ends with an error event. Responses of replicas have the header `VERSION`; Serve's own errors do not.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moray.pipelines.serve.api_error import ALIAS, FULL, ApiError, queue_full
from moray.pipelines.serve.chat_page import PAGE, PAGE_HEADERS, chat_page_file
from moray.pipelines.serve.interpreter import CollectsWhenCalm, tune_interpreter
from moray.pipelines.serve.known_limits import KnownLimits
from moray.pipelines.serve.request_body import LIMIT, MOST, BodyMemory, read_body
from moray.platform.core.serving import PREFIX

VERSION = b"x-moray-version"  # header: the version of the deployment that answered
_RETRY_SECONDS = 20.0  # for which a request is sent again, from its arrival
_MOST_DEATHS = 3  # of replicas during one request
_PAUSE_SECONDS = 0.1  # before the first repetition, then doubled
_LONGEST_PAUSE = 1.0
_MOST_COMMAS = 1 << 21  # of a body that is parsed; each takes 30 ns, in which the event loop stands still
_SMALL = 1 << 16  # bytes of a body that is parsed at once
_CARD_SECONDS = 0.5  # for the answers of replicas to /v1/models
# Paths whose body names the model.
_ANSWERS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")
_BODIES = (*_ANSWERS, "/tokenize", "/detokenize")
JSON, METRICS = b"application/json", b"text/plain; version=0.0.4; charset=utf-8"  # kinds of content
# Headers by which clients would change how Serve treats their requests: a time after which it gives up, for instance.
_ORDERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id")
_LONGEST_REQUEST_ID = 128
_GONE = 499  # Serve's status for a client that has closed its connection

Header: TypeAlias = tuple[bytes, bytes]


def middlewares() -> list[Middleware]:
    """Called by each proxy of Ray Serve at its start; named in `cluster/machine.py`."""
    gc.freeze()
    tune_interpreter()
    return [Middleware(CollectsWhenCalm), Middleware(Gateway)]


class Gateway:
    """ASGI middleware around the application of a proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._memory = BodyMemory()
        self._limits = KnownLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] not in ("http", "websocket") or path.startswith("/-/"):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        scope = {**scope, "headers": _passed(scope["headers"])}
        try:
            if not path.startswith("/"):
                raise ApiError(404, f"{path:.80} does not exist", code="unknown_url")
            routes = await self._routes()
            if _is_others(path, routes):
                await self._app(scope, receive, send)
                return
            names = _names(routes)
            if await self._answers(scope, send, names):
                return
            with self._memory.hold() as take:
                body = await read_body(receive, partial(self._largest_body, names, _authorization(scope)), take)
                if body is None:
                    return
                name = await _deployment(path, body, names)
                if name != _first(path):
                    raw = scope.get("raw_path") or path.encode()
                    scope = {**scope, "path": f"/{name}{path}", "raw_path": f"/{name}".encode() + raw}
                await self._admit((name, *_authorization(scope)), scope, body, receive, send)
        except ApiError as error:
            await _answer(send, error.status, error.body(), error.headers)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Models have none, but other applications may."""
        if _is_others(scope["path"], await self._routes()):
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close"})  # answered with status 403

    async def _answers(self, scope: Scope, send: Send, names: Sequence[str]) -> bool:
        """Whether a request is for a path of the gateway itself, which it then answers. Raises ApiError."""
        path = scope["path"]
        if path not in ("/health", "/ready", "/metrics", "/v1/models", *PAGE):
            return False
        if scope["method"] not in ("GET", "HEAD"):
            raise ApiError(405, f"{scope['method']} {path}: only GET is possible", code="method_not_allowed")
        if path in PAGE:
            await _send(send, 200, *chat_page_file(path), PAGE_HEADERS)
        elif path == "/health":
            await _answer(send, 200, {"status": "ok", "models": names})
        elif path == "/ready":
            await self._tell_ready(send, names)
        else:
            cards = await self._cards(names, _authorization(scope))
            if path != "/metrics":
                await _answer(
                    send, 200, {"object": "list", "data": [card or _card(name) for name, card in cards.items()]}
                )
            elif any(cards.values()):
                await _send(send, 200, await _metrics(), METRICS)
            else:  # nobody has accepted the key
                raise ApiError(503, "no replica answers")
        return True

    async def _routes(self) -> Mapping[str, str]:
        """The proxy's own route table: names of applications by path. Waits for it after the start of the proxy. Raises
        ApiError if it does not come."""
        deadline = time.monotonic() + _RETRY_SECONDS
        while True:
            response = _Collected()
            await self._app(_get("/-/routes"), _Replayed(b"", _never), response)
            if response.status == 200:
                return dict(json.loads(response.body))
            if time.monotonic() > deadline:
                raise ApiError(503, "the server is starting")
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _cards(self, names: Sequence[str], headers: Sequence[Header]) -> dict[str, dict[str, Any]]:
        """The models by name, as their replicas describe them; empty for one that does not answer in time. headers:
        with the client's key. Raises ApiError if it is not valid."""
        responses = await self._ask([f"/{name}/v1/models/{name}" for name in names], headers)
        for response in responses:
            if response.status == 401:
                error = json.loads(response.body)["error"]
                raise ApiError(401, error["message"], code=error["code"])
        return {
            name: json.loads(response.body) if response.status == 200 else {}
            for name, response in zip(names, responses, strict=True)
        }

    async def _tell_ready(self, send: Send, names: Sequence[str]) -> None:
        """200 if a replica of every model answers, or else 503 with those of which none does."""
        responses = await self._ask([f"/{name}/ready" for name in names], ())
        missing = [name for name, response in zip(names, responses, strict=True) if response.status != 200]
        status = 503 if missing else 200
        await _answer(send, status, {"status": "not ready" if missing else "ok", "models": names, "missing": missing})

    async def _ask(self, paths: Sequence[str], headers: Sequence[Header]) -> list[_Collected]:
        """The responses of replicas to GET; those that do not come in time have status 0."""
        responses = [_Collected() for _ in paths]
        asked = [
            asyncio.ensure_future(self._app(_get(path, headers), _Replayed(b"", _never), response))
            for path, response in zip(paths, responses, strict=True)
        ]
        _, late = await asyncio.wait(asked, timeout=_CARD_SECONDS)
        for task in late:
            task.cancel()
        return [_Collected() if task in late else response for task, response in zip(asked, responses, strict=True)]

    async def _largest_body(self, names: Sequence[str], headers: Sequence[Header]) -> int:
        """Bytes of the largest body that one of the models accepts. Each replica checks its own limit again. Raises
        ApiError, so nobody without a key sends a large one."""
        return max(int(card.get(LIMIT, MOST)) for card in (await self._cards(names, headers)).values())

    async def _admit(self, client: Hashable, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Sends a request to a replica, unless the replicas are known to have no room for it. Raises ApiError."""
        if scope["method"] != "POST" or not scope["path"].endswith(_ANSWERS):
            await self._forward(scope, body, receive, send)
            return
        if not self._limits.enter(client):
            raise queue_full(
                "the server has as many open requests from you as it has room for; try later", entirely=True
            )
        refused = False
        try:
            refused = await self._forward(scope, body, receive, send)
        finally:
            self._limits.leave(client, refused)

    async def _forward(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Sends a request until a replica responds. Returns whether it had no room for the request. Raises ApiError if
        none responds in time, or if so many died of it that the request may be the reason."""
        deadline, pause, deaths = time.monotonic() + _RETRY_SECONDS, _PAUSE_SECONDS, 0
        while True:
            attempt = _Attempt(send)
            # A copy, because the proxy takes the route off the path and adds to the headers.
            await self._app({**scope, "headers": list(scope["headers"])}, _Replayed(body, receive), attempt)
            if await attempt.finish():
                return attempt.refused
            deaths += not attempt.started
            if deaths >= _MOST_DEATHS:
                raise ApiError(503, f"{deaths} replicas stopped during this request", code="replica_lost")
            if time.monotonic() + pause > deadline:
                raise ApiError(503, "no replica of this model responds")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


class _Replayed:
    """`receive` of one attempt: the whole body, then the client's messages, which can only be a disconnect."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


class _Attempt:
    """`send` of one attempt. Holds the start of a response back until its first bytes, so that it can be discarded.

    A response without the header of a replica is Serve's own: of a replica that died, or that is not ready.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self.started = self.refused = False
        self._streams = self._forwarded = self._complete = self._failed = False

    async def __call__(self, message: Message) -> None:
        if self._failed:
            return
        if message["type"] == "http.response.start":
            self.started = True
            headers = dict(message.get("headers", ()))
            self._failed = VERSION not in headers and message["status"] != _GONE
            self.refused = FULL.encode() in headers
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self._start = message
            return
        more = message.get("more_body", False)
        if not self._forwarded:
            if more and not message.get("body"):
                return
            assert self._start is not None
            await self._send(self._start)
            self._forwarded = True
        self._complete = not more
        await self._send(message)

    async def finish(self) -> bool:
        """Ends the response. Returns False if nothing was sent, so that the request may be sent again."""
        if not self._forwarded:
            return False
        if not self._complete and self._streams:
            error = ApiError(503, "the replica stopped during this response", code="replica_lost")
            event = b"data: " + json.dumps(error.event()).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        return True  # of an incomplete response that is no stream, the server closes the connection


@dataclass
class _Collected:
    """`send` that keeps a response."""

    status: int = 0
    body: bytes = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")


class _Named(BaseModel):
    """The part of a request's body that the gateway reads."""

    model: str | None = None


def _names(routes: Mapping[str, str]) -> list[str]:
    """The names of all deployments. Raises ApiError if there are none."""
    names = sorted(route[1:] for route, application in routes.items() if application == f"{PREFIX}{route[1:]}")
    if not names:
        raise ApiError(503, "no model is served here: not yet, or not any more")
    return names


def _is_others(path: str, routes: Mapping[str, str]) -> bool:
    """Whether a path belongs to an application that is not Moray's: by the longest prefix, as in Serve. The paths of
    models are not those of an application at `/`, if any model is deployed."""
    prefixes = [one for one in routes if path == one or path.startswith(one.rstrip("/") + "/")]
    longest = max(prefixes, key=len, default="")
    if not longest or routes[longest].startswith(PREFIX):
        return False
    models = any(application.startswith(PREFIX) for application in routes.values())
    return not (longest == "/" and models and (path == "/health" or path.startswith("/v1/")))


async def _deployment(path: str, body: bytes, names: Sequence[str]) -> str:
    """The name of the deployment that a request is for. Raises ApiError."""
    if (first := _first(path)) in names:
        return first
    if len(names) == 1 and path in _BODIES:
        return names[0]  # which checks the name itself, so a body of megabytes is not parsed here
    if path.startswith("/v1/models/"):
        given = path.removeprefix("/v1/models/")
    elif len(body) < _SMALL:
        given = _model(path, body, len(names) > 1)
    else:
        given = await asyncio.to_thread(_model, path, body, len(names) > 1)
    if given in names:
        return given
    if len(names) == 1 and (given in ("", ALIAS) or not path.startswith("/v1/")):
        return names[0]
    known = ", ".join(names)
    if not (path.startswith("/v1/") or path in _BODIES):
        raise ApiError(404, f"{path} does not exist; deployed models: {known}", code="unknown_url")
    if given in ("", ALIAS):
        raise ApiError(400, f"model: name one of {known}", "model")
    raise ApiError(404, f"the model {given!r:.200} does not exist; deployed: {known}", "model", "model_not_found")


def _model(path: str, body: bytes, several: bool) -> str:
    """The model that a request names in its body; "" for none. Raises ApiError for an invalid body if
    there are several deployments."""
    if not (path.startswith("/v1/") or path in _BODIES) or not body:
        return ""
    if body.count(b",") > _MOST_COMMAS:
        raise ApiError(413, f"the body has more than {_MOST_COMMAS:,} commas, the limit for requests to any model")
    try:
        return _Named.model_validate_json(body).model or ""
    except ValidationError:  # the only deployment reports what is wrong
        if several:
            raise ApiError(400, "the body must be a JSON object, and `model` a string", "model") from None
        return ""


def _first(path: str) -> str:
    return path.split("/", 2)[1] if path.startswith("/") else ""


async def _metrics() -> bytes:
    from moray.pipelines.serve.metrics import as_text, read_board

    return as_text(await read_board())


async def _answer(send: Send, status: int, body: Mapping[str, Any], more: Mapping[str, str] | None = None) -> None:
    await _send(send, status, json.dumps(body).encode(), JSON, more)


async def _send(send: Send, status: int, data: bytes, kind: bytes, more: Mapping[str, str] | None = None) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(data)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in (more or {}).items()]
    if status in (408, 413):  # the client may still send
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": False})


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "moray"}


def _passed(headers: Sequence[Header]) -> list[Header]:
    """The headers of a client without those that Ray Serve takes as orders, or cannot read."""
    return [
        (name, value)
        for name, value in headers
        if name not in _ORDERS
        and not name.startswith(b"x-serve-")
        and (name != b"x-request-id" or (value.isascii() and len(value) <= _LONGEST_REQUEST_ID))
    ]


def _authorization(scope: Scope) -> list[Header]:
    """The header with the client's key."""
    return [(name, value) for name, value in scope["headers"] if name == b"authorization"]


def _get(path: str, headers: Sequence[Header] = ()) -> Scope:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": list(headers),
        "client": None, "server": None,
    }  # fmt: skip


async def _never() -> Message:
    """`receive` of a client that stays connected."""
    return await asyncio.get_running_loop().create_future()
