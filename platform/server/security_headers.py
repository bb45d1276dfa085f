"""Security headers for every response, and checks of the Host and Origin of every request.

The token authenticates users; this module protects a logged-in browser. A foreign site may point its own host name at
127.0.0.1 (DNS rebinding), so requests for unknown hosts are refused. Cookies do not distinguish ports, so a page served
by another program on this machine counts as the same site; requests that change state must therefore come from the
controller's own origin.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_FOREIGN = "/mlflow"  # MLflow's page, whose scripts and styles need another policy
_SAFE = ("GET", "HEAD", "OPTIONS")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class PageGuard:
    """ASGI middleware, the outermost one. `hosts`: accepted Host names in addition to the loopback addresses."""

    def __init__(self, app: App, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = {*LOOPBACK, *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", [])}
        host, origin = given.get(b"host", ""), given.get(b"origin")
        if _name(host) not in self._hosts:
            await _refuse(send, 400, f"host {host!r} is not served here", "open the address printed by `moray up`")
        elif scope.get("method", "GET") not in _SAFE and origin is not None and urlsplit(origin).netloc != host:
            await _refuse(
                send,
                403,
                f"pages from {origin} may not change anything",
                "open the page from this server's own address",
            )
        else:
            await self._app(scope, receive, _with_headers(send, scope["path"]))


def _name(host: str) -> str:
    """The host name in a Host header without the port; empty if malformed."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _with_headers(send: Any, path: str) -> Any:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            known = {name.lower() for name, _ in headers}
            ours = {b"x-content-type-options": "nosniff", b"referrer-policy": "same-origin"}
            if not path.startswith(_FOREIGN):
                ours |= {b"content-security-policy": PAGE_POLICY, b"x-frame-options": "DENY"}
            headers += [(name, value.encode()) for name, value in ours.items() if name not in known]
            message = {**message, "headers": headers}
        await send(message)

    return sending


async def _refuse(send: Any, status: int, error: str, hint: str) -> None:
    body = json.dumps({"error": error, "hint": hint}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
