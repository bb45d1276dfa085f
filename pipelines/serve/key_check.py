"""Keys of requests: 401 without a valid one, 429 above its limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.key_meter import Quota, SharedMeter
from moray.platform.core.api_keys import ApiKey, hash_key

OPEN = ("/health", "/ready")  # paths that need no key
_STATE = "moray_key"


class KeyCheck:
    """The keys that a replica accepts. required: whether requests need one."""

    def __init__(self, required: bool = False, shared: bool = False) -> None:
        self.required = required
        self.meter = SharedMeter(shared)
        self._keys: dict[str, ApiKey] = {}

    def update(self, keys: Iterable[Mapping[str, Any]]) -> None:
        """Accepts these keys from now on, and no others."""
        self._keys = {key.sha256: key for key in map(ApiKey.model_validate, keys)}

    def find(self, authorization: str) -> ApiKey | None:
        """The key of an `Authorization` header; None if no key is required. Raises ApiError."""
        if not self.required:
            return None
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise ApiError(401, "this server needs a key: send the header Authorization: Bearer KEY", code="no_api_key")
        found = self._keys.get(hash_key(text.strip()))
        if found is None:
            raise ApiError(401, "the key is not valid: it is unknown, or was revoked", code="invalid_api_key")
        return found


class KeyRequired:
    """ASGI middleware: finds the key of each request, or answers with 401."""

    def __init__(self, app: ASGIApp, keys: KeyCheck) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Serve puts the route of the model before the path, and into root_path.
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN:
            headers = dict(scope["headers"])
            try:
                scope[_STATE] = self._keys.find(headers.get(b"authorization", b"").decode("latin-1"))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def key_of(scope: Scope) -> ApiKey | None:
    """The key that `KeyRequired` found."""
    found: ApiKey | None = scope.get(_STATE)
    return found


def check_quota(quota: Quota, tokens: int) -> None:
    """Raises ApiError for a request that was not admitted."""
    if not quota.wait:
        return
    limit = quota.headers[f"x-ratelimit-limit-{quota.short}"]
    if math.isinf(quota.wait):
        message = f"the request takes {tokens} tokens, and the key's limit is {limit} a minute: send a smaller one"
        headers = quota.headers
    else:
        message = f"the key's limit of {limit} {quota.short} a minute is reached; try again in {quota.wait:.1f} s"
        headers = {**quota.headers, "Retry-After": str(math.ceil(quota.wait))}
    raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
