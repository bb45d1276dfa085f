"""Responses to `POST /v1/responses`: a `response` object, or a stream of typed events that build it up.

The output's items are reasoning, messages and calls, in the order in which the model wrote them.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from moray.pipelines.serve.answer_parser import Piece
from moray.pipelines.serve.api_error import ApiError
from moray.pipelines.serve.api_response import ApiResponse, event, joined_deltas
from moray.pipelines.serve.chat_prompt import ChatPrompt
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.protocol import StreamOptions
from moray.pipelines.serve.responses_request import ResponsesRequest
from moray.pipelines.serve.sequence import Delta, FinishReason, Request


class ResponsesResponse(ApiResponse):
    """request: whose settings the response repeats."""

    def __init__(
        self,
        request: ResponsesRequest,
        engine: Engine,
        model: str,
        requests: Sequence[Request],
        prompt: ChatPrompt,
        options: StreamOptions | None = None,
        by_id: bool = False,
    ) -> None:
        super().__init__(engine, model, requests, len(requests), options, by_id)
        self._request = request
        self._id = f"resp_{secrets.token_hex(24)}"
        self._parser = prompt.parser()
        self._output: list[dict[str, Any]] = []
        self._number = 0  # of the next event
        self._reason: FinishReason | None = None

    def chunk(self, index: int, delta: Delta) -> bytes:
        began = b"" if self._number else self._begin()
        return began + b"".join(self._events(delta))

    def end(self) -> bytes:
        kind = "response.incomplete" if self._reason == "length" else "response.completed"
        return self._event(kind, response=self._body())

    def failure(self, error: ApiError) -> bytes:
        began = b"" if self._number else self._begin()
        failed = {
            **self._body(),
            "status": "failed",
            "error": {"code": error.code or "server_error", "message": error.message},
        }
        return began + self._event("response.failed", response=failed) + event(error.event())

    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        for _ in self._events(joined_deltas(answers[0])):
            pass
        return self._body()

    def _begin(self) -> bytes:
        body = self._body()
        return self._event("response.created", response=body) + self._event("response.in_progress", response=body)

    def _events(self, delta: Delta) -> Iterator[bytes]:
        """Adds a delta to the output. Yields its events."""
        self._count(0, delta)
        self._reason = delta.finish_reason
        ended = delta.finish_reason is not None
        for piece in self._parser.feed(delta.text, ended):
            if not self._continues(piece):
                yield from self._close("completed")
                yield from self._open(piece)
            yield from self._add(piece)
        if ended and not self._output:  # clients expect a message
            yield from self._open(Piece("content", ""))
        if ended:
            yield from self._close("incomplete" if self._reason == "length" else "completed")

    def _continues(self, piece: Piece) -> bool:
        """Whether a piece belongs to the open item."""
        if not self._output or self._output[-1]["status"] != "in_progress" or piece.kind == "call":
            return False
        return bool(_ITEM[piece.kind] == self._output[-1]["type"])

    def _open(self, piece: Piece) -> Iterator[bytes]:
        item: dict[str, Any] = {"type": _ITEM[piece.kind], "status": "in_progress"}
        if item["type"] == "function_call":
            item |= {"id": f"fc_{secrets.token_hex(24)}", "call_id": f"call_{secrets.token_hex(12)}"}
            item |= {"name": piece.text, "arguments": ""}
        elif item["type"] == "reasoning":
            item |= {"id": f"rs_{secrets.token_hex(24)}", "summary": [], "content": []}
        else:
            item |= {"id": f"msg_{secrets.token_hex(24)}", "role": "assistant", "content": []}
        self._output.append(item)
        yield self._of_item("response.output_item.added", item=copy.deepcopy(item), item_id=None)
        if "content" in item:
            item["content"].append(_part(item))
            yield self._of_item("response.content_part.added", content_index=0, part=_part(item))

    def _add(self, piece: Piece) -> Iterator[bytes]:
        item = self._output[-1]
        if piece.kind == "arguments":
            item["arguments"] += piece.text
            yield self._of_item("response.function_call_arguments.delta", delta=piece.text)
        elif piece.kind != "call":
            item["content"][0]["text"] += piece.text
            yield self._of_item(
                f"response.{_TEXT[item['type']]}.delta", content_index=0, delta=piece.text, **_scores(item)
            )

    def _close(self, status: str) -> Iterator[bytes]:
        if not self._output or self._output[-1]["status"] != "in_progress":
            return
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **arguments)
        else:
            part = item["content"][0]
            kind = f"response.{_TEXT[item['type']]}.done"
            yield self._of_item(kind, content_index=0, text=part["text"], **_scores(item))
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._of_item("response.output_item.done", item=item, item_id=None)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        place = {"output_index": len(self._output) - 1, "item_id": self._output[-1]["id"]}
        return self._event(kind, **{name: value for name, value in (place | fields).items() if value is not None})

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _body(self) -> dict[str, Any]:
        asked = self._request
        dumped = asked.model_dump(by_alias=True, exclude_none=True, include={"tools", "tool_choice", "text"})
        status = {None: "in_progress", "length": "incomplete"}.get(self._reason, "completed")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "model": self._model,
            "output": self._output,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}, **dumped["text"]},
            "tool_choice": dumped["tool_choice"],
            "tools": dumped["tools"],
            "top_logprobs": 0,
            "top_p": asked.top_p,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "truncation": "disabled",
            "service_tier": "default",
            "usage": None if status == "in_progress" else self._usage(),
            "user": None,
            "metadata": {},
        }

    def _usage(self) -> dict[str, Any]:
        """Tokens of reasoning: as its text has when it is tokenized again."""
        texts = [item["content"][0]["text"] for item in self._output if item["type"] == "reasoning"]
        thought = sum(len(self._vocabulary.encode(text)) for text in texts)
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": min(thought, self.generated_tokens)},
            "total_tokens": self.prompt_tokens + self.generated_tokens,
        }


_ITEM = {"reasoning": "reasoning", "content": "message", "call": "function_call", "arguments": "function_call"}
_TEXT = {"reasoning": "reasoning_text", "message": "output_text"}  # types of parts, by type of item


def _part(item: dict[str, Any]) -> dict[str, Any]:
    """The empty part of an item with text."""
    more = {"annotations": [], **_scores(item)} if item["type"] == "message" else {}
    return {"type": _TEXT[item["type"]], "text": "", **more}


def _scores(item: dict[str, Any]) -> dict[str, Any]:
    """The field for log probabilities, which this route does not have."""
    return {"logprobs": []} if item["type"] == "message" else {}
