"""What the responses of all routes have in common: envelope, token usage, server-sent events, JSON.

Notable: the same functions build a response and a stream from the same deltas, so the events of a stream join to the
unstreamed response: text, tokens, log probabilities and offsets.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.protocol import StreamOptions
from moray.pipelines.serve.sequence import Delta, Request

_SLICE = 512  # list elements per call of the JSON encoder
DONE = b"data: [DONE]\n\n"


class ApiResponse(ABC):
    """The response to one API call, and its token usage.

    model: the model's name in the response. choices: consecutive requests that have one prompt, which is counted once.
    options: of a stream. by_id: whether tokens are named by their ids.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        requests: Sequence[Request],
        choices: int = 1,
        options: StreamOptions | None = None,
        by_id: bool = False,
    ) -> None:
        self._vocabulary = engine.vocabulary
        self._choices = choices
        self._options = options or StreamOptions()
        self._by_id = by_id
        self._scored = bool(requests) and requests[0].logprobs is not None
        self.prompt_tokens = sum(engine.prompt_tokens(request) for request in requests[::choices])
        self._generated, self._cached = [0] * len(requests), [0] * len(requests)
        self._model, self._created = model, int(time.time())

    @abstractmethod
    def chunk(self, index: int, delta: Delta) -> bytes:
        """The events of a stream for one delta, if any."""

    @abstractmethod
    def end(self) -> bytes:
        """The last events of a stream."""

    def failure(self, error: ApiError) -> bytes:
        """The last events of a stream that cannot go on."""
        return event(error.body())

    @abstractmethod
    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The unstreamed response, with the deltas of each request."""

    def label(self, index: int) -> str:
        """The name of a token in logprobs."""
        return f"token_id:{index}" if self._by_id else self._vocabulary.label(index)

    def _count(self, index: int, delta: Delta) -> None:
        self._generated[index] = max(self._generated[index], delta.generated)
        self._cached[index] = delta.cached

    @property
    def generated_tokens(self) -> int:
        """With end-of-document tokens, which have no text."""
        return sum(self._generated)

    @property
    def cached_tokens(self) -> int:
        """Ids of prompts that were in the cache."""
        return sum(self._cached[:: self._choices])


class ChoicesResponse(ApiResponse):
    """A response with `choices`, and a stream of chunks that have them too."""

    prefix: str  # of the response's id
    kind: str  # `object` of the response
    chunk_kind: str  # `object` of an event

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._envelope = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "created": self._created, "model": self._model
        }  # fmt: skip

    @abstractmethod
    def choice(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """One delta as an element of `choices` of an event; None if it has nothing to tell."""

    @abstractmethod
    def whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """A whole answer as an element of `choices`."""

    def chunk(self, index: int, delta: Delta) -> bytes:
        # `usage: null` announces a final event with the usage.
        self._count(index, delta)
        choice = self.choice(index, delta)
        if choice is None:
            return b""
        body = {**self._envelope, "object": self.chunk_kind, "choices": [choice]}
        if self._options.continuous_usage_stats:
            return event({**body, "usage": self.usage()})
        return event({**body, "usage": None} if self._options.include_usage else body)

    def end(self) -> bytes:
        if not self._options.include_usage:
            return DONE
        return event({**self._envelope, "object": self.chunk_kind, "choices": [], "usage": self.usage()}) + DONE

    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        joined = [joined_deltas(deltas) for deltas in answers]
        for index, delta in enumerate(joined):
            self._count(index, delta)
        choices = [self.whole_choice(index, delta) for index, delta in enumerate(joined)]
        return {**self._envelope, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def response_json(value: Any) -> bytes:
    """UTF-8 JSON. Long lists are encoded in slices, because one call for all would hold the GIL for seconds."""
    return _json(value).encode()


def _json(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{_dumps(key)}:{_json(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict) and len(value) <= _SLICE:
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, list) and len(value) > _SLICE:
        return "[" + ",".join(_dumps(value[at : at + _SLICE])[1:-1] for at in range(0, len(value), _SLICE)) + "]"
    return _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(body: dict[str, Any], kind: str = "") -> bytes:
    """A server-sent event. kind: its name, if it has one."""
    name = f"event: {kind}\n".encode() if kind else b""
    return name + b"data: " + response_json(body) + b"\n\n"


def joined_deltas(deltas: Sequence[Delta]) -> Delta:
    """All of an answer as one."""
    last = deltas[-1]
    return Delta(
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        generated=last.generated,
        finish_reason=last.finish_reason,
        cached=last.cached,
        embedding=last.embedding,
    )
