"""Errors of the HTTP API, as OpenAI error objects. The proxies import this module, so it imports nothing heavy."""

from __future__ import annotations

from typing import Any

ALIAS = "default"  # stands for the served model


class ApiError(Exception):
    """An error response: status 4xx for client errors, 5xx for server errors."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
