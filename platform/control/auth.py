"""Token authentication of the control plane: one secret in `MORAY_HOME/token`, required by almost every route.

A request sends it as `Authorization: Bearer TOKEN` or as the cookie set by the login form, because event streams in a
browser cannot set headers. The cookie is HttpOnly and SameSite=Strict, so pages of other sites cannot use it.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

from moray.platform.core.atomic import create_bytes
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home

COOKIE = "moray_token"
OPEN = ("/health", "/login")  # the only paths that need no token

Scope = Mapping[str, Any]


def ensure_token(home: Home) -> str:
    """Returns the token of this MORAY_HOME. Creates it on first use, readable by its owner only."""
    create_bytes(home.token, secrets.token_urlsafe(32).encode() + b"\n")  # a temporary file of mode 0600, then linked
    return read_token(home)


def read_token(home: Home) -> str:
    """Returns the token. Raises InputError if it is missing, empty, or readable by other users."""
    try:
        mode = os.stat(home.token).st_mode
        token = home.token.read_text().strip()
    except FileNotFoundError:
        raise InputError(f"no token in {home.root}", "start the control plane: moray up") from None
    if mode & 0o077:
        raise InputError(f"{home.token} is readable by other users", f"chmod 600 {home.token}")
    if not token:
        raise InputError(f"{home.token} is empty", "delete it; `moray up` creates a new one")
    return token


class TokenRequired:
    """ASGI middleware: 401 for a request without the token, unless its path is one of `OPEN`."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] in ("lifespan",) or scope["path"] in OPEN or self.matches(_presented(scope)):
            await self._app(scope, receive, send)
            return
        from starlette.responses import JSONResponse, RedirectResponse, Response

        answer: Response
        if _from_a_browser(scope):
            query = "" if scope["path"] == "/" else f"?next={quote(scope['path'], safe='')}"
            answer = RedirectResponse(f"/login{query}", status_code=303)
        else:
            hint = "send `Authorization: Bearer TOKEN`; the token is in $MORAY_HOME/token"
            content = {"error": "missing or invalid token", "hint": hint}
            answer = JSONResponse(content, 401, {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)  # type: ignore[arg-type]

    def matches(self, presented: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(presented.encode(), self._token.encode())


def _from_a_browser(scope: Scope) -> bool:
    """Whether a browser requests a page. Browsers are redirected to the login form; programs receive a JSON error."""
    accepted = dict(scope.get("headers", [])).get(b"accept", b"")
    return scope["type"] == "http" and scope["method"] == "GET" and b"text/html" in accepted


def _presented(scope: Scope) -> str:
    """The token sent with a request; empty if none."""
    headers = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", [])}
    scheme, _, value = headers.get(b"authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    # Parsed by hand: the standard library's parser stops at a malformed cookie of another application.
    for pair in headers.get(b"cookie", "").split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            return value.strip().strip('"')
    return ""
