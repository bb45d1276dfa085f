"""Responses to `POST /v1/chat/completions`: a `chat.completion` object, or a stream of `chat.completion.chunk`.

Reasoning is in `reasoning_content`, as in DeepSeek's API.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from moray.pipelines.serve.answer_parser import Piece
from moray.pipelines.serve.api_response import ChoicesResponse
from moray.pipelines.serve.chat_prompt import ChatPrompt
from moray.pipelines.serve.detokenizer import Token
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.protocol import StreamOptions
from moray.pipelines.serve.sequence import Delta, Request


class ChatResponse(ChoicesResponse):
    """Its choices have a `message`, or `delta` in a stream."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        engine: Engine,
        model: str,
        requests: Sequence[Request],
        prompt: ChatPrompt,
        options: StreamOptions | None = None,
        by_id: bool = False,
    ) -> None:
        super().__init__(engine, model, requests, len(requests), options, by_id)
        self._parsers = [prompt.parser() for _ in requests]
        self._begun = [False] * len(requests)

    def choice(self, index: int, delta: Delta) -> dict[str, Any] | None:
        parser, ended = self._parsers[index], delta.finish_reason is not None
        calls = parser.calls
        change = _change(parser.feed(delta.text, ended), calls)
        if not self._begun[index]:
            change = {"role": "assistant", "content": "", **change}
            self._begun[index] = True
        elif not change and not ended and not (self._scored and delta.tokens):
            return None
        return self._choice(index, delta, "delta", change)

    def whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        pieces = self._parsers[index].feed(delta.text, last=True)
        texts = {kind: "".join(one.text for one in pieces if one.kind == kind) for kind in ("content", "reasoning")}
        change = _change(pieces, 0)
        calls = [
            {key: part for key, part in call.items() if key != "index"}
            for call in _whole_calls(change.get("tool_calls", []))
        ]
        content = texts["content"]
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content.strip() else content}
        message["refusal"] = None
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        return self._choice(index, delta, "message", message)

    def _choice(self, index: int, delta: Delta, name: str, body: dict[str, Any]) -> dict[str, Any]:
        reason: str | None = delta.finish_reason
        if reason == "stop" and self._parsers[index].calls:
            reason = "tool_calls"
        logprobs = (
            {"content": [self._scores(token) for token in delta.tokens], "refusal": None} if self._scored else None
        )
        return {"index": index, name: body, "logprobs": logprobs, "finish_reason": reason}

    def _scores(self, token: Token) -> dict[str, Any]:
        return {**self._score(token.id, token.logprob), "top_logprobs": [self._score(*pair) for pair in token.top]}

    def _score(self, index: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.label(index), "logprob": logprob, "bytes": list(self._vocabulary.piece(index)) or None}


def _change(pieces: Sequence[Piece], calls: int) -> dict[str, Any]:
    """The `delta` of an event. calls: that came before these pieces."""
    change: dict[str, Any] = {}
    for piece in pieces:
        if piece.kind == "call":
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
            function = {"name": piece.text, "arguments": ""}
            change.setdefault("tool_calls", []).append({"index": calls, **call, "function": function})
            calls += 1
        elif piece.kind == "arguments":
            change.setdefault("tool_calls", []).append({"index": calls - 1, "function": {"arguments": piece.text}})
        else:
            name = "reasoning_content" if piece.kind == "reasoning" else "content"
            change[name] = change.get(name, "") + piece.text
    return change


def _whole_calls(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of a stream's deltas, joined."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if "id" in part:
            calls.append({**part, "function": dict(part["function"])})
        else:
            calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return calls
