"""Responses to `POST /v1/completions`: a `text_completion` object, or a stream of server-sent events.

Notable: the same functions build both from the same deltas, so the events of a stream join to the unstreamed response:
text, tokens, log probabilities and offsets.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from moray.pipelines.serve.detokenizer import ServingVocabulary, Token
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.sequence import Delta, Request

_SLICE = 512  # list elements per call of the JSON encoder
DONE = b"data: [DONE]\n\n"


class Completion:
    """The response to one API call, and its token usage. model: the model name in the response. choices: consecutive
    requests that have one prompt, which is counted once."""

    def __init__(self, engine: Engine, model: str, requests: Sequence[Request], choices: int = 1) -> None:
        self._vocabulary = engine.vocabulary
        self._scored = bool(requests) and requests[0].logprobs is not None
        self.prompt_tokens = sum(engine.prompt_tokens(request) for request in requests[::choices])
        self._generated = [0] * len(requests)
        self._envelope = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """One delta as an element of `choices`."""
        self._generated[index] = max(self._generated[index], delta.generated)
        logprobs = _logprobs(delta.tokens, self._vocabulary) if self._scored else None
        return {"text": delta.text, "index": index, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def chunk(self, index: int, delta: Delta, with_usage: bool) -> bytes:
        """One event of a stream. with_usage: includes `usage: null`, which announces a final usage event."""
        body = {**self._envelope, "choices": [self.choice(index, delta)]}
        return event({**body, "usage": None} if with_usage else body)

    def usage_chunk(self) -> bytes:
        """The final event, with the usage."""
        return event({**self._envelope, "choices": [], "usage": self.usage()})

    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The unstreamed response, with the joined deltas of each request."""
        choices = [self.choice(index, _joined(deltas)) for index, deltas in enumerate(answers)]
        return {**self._envelope, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Prompt tokens (with bos) and generated tokens (with an end-of-document token, which has no text)."""
        generated = sum(self._generated)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }


def completion_json(value: Any) -> bytes:
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


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + completion_json(body) + b"\n\n"


def _joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        generated=deltas[-1].generated,
        finish_reason=deltas[-1].finish_reason,
    )


def _logprobs(tokens: Sequence[Token], vocabulary: ServingVocabulary) -> dict[str, Any]:
    """The API's four parallel lists. `top_logprobs` includes the chosen token, as in OpenAI's API."""
    return {
        "tokens": [vocabulary.label(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_alternatives(token, vocabulary) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _alternatives(token: Token, vocabulary: ServingVocabulary) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    pairs = [*token.top, (token.id, token.logprob)]
    return {vocabulary.label(index): logprob for index, logprob in pairs}
