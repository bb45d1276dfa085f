"""Errors of the HTTP API, as OpenAI error objects. The proxies import this module, so it imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

ALIAS = "default"  # stands for the served model
FULL = "x-moray-queue-full"  # header of refusals for lack of room for even one answer
_RETRY_AFTER = "1"  # seconds
_KINDS = {429: "rate_limit_error"}


def queue_full(message: str, entirely: bool) -> ApiError:
    """The error for a request that a server has no room for now. entirely: nor for any other of this client."""
    headers = {"Retry-After": _RETRY_AFTER, **({FULL: "1"} if entirely else {})}
    return ApiError(429, message, code="queue_full", headers=headers)


class ApiError(Exception):
    """An error response: status 4xx for client errors, 5xx for server errors."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self._headers = headers

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def event(self) -> dict[str, Any]:
        """The last event of a stream of any route: /v1/responses has typed events."""
        return {"type": "error", "code": self.code, "message": self.message, "param": self.param, **self.body()}

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same error with other names of fields, also in its text."""
        pattern = r"\b(" + "|".join(sorted(names, key=len, reverse=True)) + r")\b"
        message = re.sub(pattern, lambda found: names[found[0]], self.message)
        return ApiError(self.status, message, names.get(self.param or "", self.param), self.code, self._headers)

    @property
    def headers(self) -> dict[str, str]:
        """Of the response, besides those of its body."""
        if self._headers is not None:
            return dict(self._headers)
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": _RETRY_AFTER} if self.status in (429, 503) else {}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, self.headers)
