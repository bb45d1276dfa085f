"""Responses to `POST /v1/completions`: a `text_completion` object, or a stream of server-sent events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moray.pipelines.serve.api_response import ChoicesResponse
from moray.pipelines.serve.detokenizer import Token
from moray.pipelines.serve.sequence import Delta


class CompletionResponse(ChoicesResponse):
    """Its choices have `text`, and log probabilities as parallel lists."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.tokens) if self._scored else None
        return {"text": delta.text, "index": index, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return self.choice(index, delta)

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The API's four parallel lists. `top_logprobs` includes the chosen token, as in OpenAI's API."""
        return {
            "tokens": [self.label(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _alternatives(self, token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        return {self.label(index): logprob for index, logprob in (*token.top, (token.id, token.logprob))}
