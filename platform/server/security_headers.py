"""What every answer of the controller carries, and which requests it does not take at all.

A token keeps strangers out; this keeps a browser from being used against its owner. A page elsewhere may point a name
of its own at 127.0.0.1 (DNS rebinding): so only known hosts are answered. Cookies do not tell ports apart, so a page
that another program serves on this machine counts as the same site: so a change must come from a page of ours.
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
_FOREIGN = "/mlflow"  # not our page: its scripts and styles need another policy
_SAFE = ("GET", "HEAD", "OPTIONS")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class PageGuard:
    """ASGI middleware, the outermost. `hosts`: names and addresses, beside the loopback's, that may be asked for."""

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
            await _refuse(send, 400, f"host {host!r} is not served here", "open the address that `moray up` printed")
        elif scope.get("method", "GET") not in _SAFE and origin is not None and urlsplit(origin).netloc != host:
            await _refuse(send, 403, f"a page of {origin} may change nothing here", "use the page at this address")
        else:
            await self._app(scope, receive, _with_headers(send, scope["path"]))


def _name(host: str) -> str:
    """The host of a Host header, without its port; empty if it is malformed."""
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
