"""Reads a model's answer as it is written: its reasoning, its content, and its calls of tools.

A call's arguments end where their JSON object ends, so text inside them that looks like a mark ends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moray.pipelines.serve.tool_format import ToolFormat

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """A part of an answer. text: of a call, its name."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str


class AnswerParser:
    """tools: how calls are written; None if there are none. reasons: whether answers may begin with reasoning.
    reasoning: whether this one begins inside of it."""

    def __init__(self, tools: ToolFormat | None, reasons: bool = False, reasoning: bool = False) -> None:
        self._tools = tools
        self._state = "reasoning" if reasoning else "start" if reasons else "content"
        self._held = ""
        self._object = _ObjectEnd()
        self.calls = 0

    def feed(self, text: str, last: bool = False) -> list[Piece]:
        """The pieces that are certain after this text. last: whether it is the end of the answer."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            before = (self._state, len(self._held))
            piece = self._next(last)
            if piece is not None and piece.text:
                pieces.append(piece)
            if (self._state, len(self._held)) == before:
                return _merged(pieces)

    def _next(self, last: bool) -> Piece | None:
        match self._state:
            case "start":
                return self._begin(last)
            case "reasoning":
                return self._until(THOUGHT, "reasoning", "gap", last)
            case "gap":  # white space between reasoning and content
                self._held = self._held.lstrip()
                if self._held:
                    self._state = "content"
                return None
            case "content":
                mark = self._tools.opening if self._tools else None
                return self._until(mark, "content", "call", last)
            case "arguments":
                return self._arguments()
        return self._mark(self._state)

    def _begin(self, last: bool) -> Piece | None:
        shown = self._held.lstrip()
        if shown.startswith(THINK):
            self._held, self._state = shown[len(THINK) :], "reasoning"
        elif last or not THINK.startswith(shown):
            self._state = "content"
        return None

    def _until(self, mark: str | None, kind: Literal["reasoning", "content"], following: str, last: bool) -> Piece:
        """Text up to a mark. The beginning of a mark is held back."""
        place = self._held.find(mark) if mark else -1
        if mark and place >= 0:
            found, self._held, self._state = self._held[:place], self._held[place + len(mark) :], following
        else:
            length = len(self._held) - (0 if last or not mark else _overlap(self._held, mark))
            found, self._held = self._held[:length], self._held[length:]
        return Piece(kind, found)

    def _mark(self, state: str) -> Piece | None:
        """Reads what stands around a call: its name, and the marks after its arguments."""
        assert self._tools is not None
        tools = self._tools
        if state == "call" and self._held.startswith(tools.call):
            rest = self._held[len(tools.call) :]
            name, found, after = rest.partition(tools.middle)
            if found:
                self._held, self._state, self._object = after, "arguments", _ObjectEnd()
                self.calls += 1
                return Piece("call", name)
        elif state == "close" and self._held.startswith(tools.close):
            self._held, self._state = self._held[len(tools.close) :], "more"
        elif state == "more" and self._held:
            following = tools.between + tools.call
            if self._held.startswith(following):
                self._held, self._state = self._held[len(tools.between) :], "call"
            elif not following.startswith(self._held):
                self._held = self._held.removeprefix(tools.end)
                self._state = "done"
        elif state == "done":
            self._held = ""
        return None

    def _arguments(self) -> Piece:
        length, ended = self._object.scan(self._held)
        found, self._held = self._held[:length], self._held[length:]
        if ended:
            self._state = "close"
        return Piece("arguments", found)


class _ObjectEnd:
    """Finds the end of a JSON object that comes in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def scan(self, text: str) -> tuple[int, bool]:
        """Characters of `text` that belong to the object, and whether it ends there."""
        for place, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1, True
        return len(text), False


def _overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of `text` that begins `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind joined, except for calls."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].kind == piece.kind != "call":
            found[-1] = Piece(piece.kind, found[-1].text + piece.text)
        else:
            found.append(piece)
    return found
