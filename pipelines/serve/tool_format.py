"""How models write calls of tools: which marks stand around a call, its name and its arguments.

A template that lists tools also shows the model how a call is written, so the format is that of the template's source.
Grammars make a model write exactly this format, with arguments that are valid against the tool's schema.
"""

# ruff: noqa: RUF001  (marks of DeepSeek's models have full-width bars)
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.grammar import GrammarText, of_schema

_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. parameters: JSON Schema of the arguments. strict: whether every keyword of the
    schema must be supported, instead of being left out."""

    name: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class ToolFormat:
    """opening, call, NAME, middle, ARGUMENTS, close; then more calls after `between`, then `end`."""

    opening: str
    call: str
    middle: str
    close: str
    between: str
    end: str

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts of the format."""
        return (self.opening, self.call, self.middle, self.close, self.between, self.end)

    def grammar(
        self,
        tools: Sequence[Tool],
        vocabulary: ServingVocabulary,
        required: bool,
        parallel: bool,
        text: GrammarText | None,
    ) -> GrammarText:
        """Calls of these tools: at least one if `required`, at most one unless `parallel`. Otherwise also an answer
        without a call, which follows `text`."""
        parts = {f"tool{place}": self._call(tool, vocabulary) for place, tool in enumerate(tools)}
        one = "(" + " | ".join(f"@{name}" for name in parts) + ")"
        more = f"({_literal(self.between, vocabulary)} {one})*" if parallel else ""
        calls = f"{one} {more} {_literal(self.end, vocabulary)}".strip()
        opening = _literal(self.opening, vocabulary)
        if required:
            return GrammarText(f"{opening} {calls}", parts)
        if text is not None:  # free text before a call would be an answer without the form
            return GrammarText(f"{text.rule} | {opening} {calls}", {**text.parts, **parts})
        if opening.startswith("<"):  # a control token, which is no text
            begins = f"TEXT {opening}"
            rules = f"\nTEXT: {_TEXT}"
        else:
            begins = "opening"
            rules = f"\nopening[lazy]: TEXT {opening}\nTEXT: {_TEXT}"
        return GrammarText(f"TEXT | {begins} {calls}{rules}", parts)

    def _call(self, tool: Tool, vocabulary: ServingVocabulary) -> str:
        schema = of_schema(_closed(tool.parameters), lenient=not tool.strict)
        before, after = (_literal(text, vocabulary) for text in (f"{self.call}{tool.name}{self.middle}", self.close))
        return f"start: {before} {schema.rule} {after}"


_DEEPSEEK_V3 = ToolFormat(
    opening="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    middle="\n```json\n",
    close="\n```<｜tool▁call▁end｜>",
    between="\n",
    end="<｜tool▁calls▁end｜>",
)
_DEEPSEEK_V31 = ToolFormat(
    opening="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>",
    middle="<｜tool▁sep｜>",
    close="<｜tool▁call▁end｜>",
    between="",
    end="<｜tool▁calls▁end｜>",
)
_HERMES = ToolFormat(
    opening="<tool_call>",
    call='\n{"name": "',
    middle='", "arguments": ',
    close="}\n</tool_call>",
    between="\n<tool_call>",
    end="",
)


def _closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """A schema of arguments without others than it names, unless it speaks of others: few functions take them."""
    open_by = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")
    closed = {} if any(key in parameters for key in open_by) else {"additionalProperties": False}
    return {"type": "object", "properties": {}, **closed, **parameters}


def format_of(template: str) -> ToolFormat | None:
    """The format that a template's source shows; None for one that is not known."""
    if _DEEPSEEK_V3.opening in template:
        return _DEEPSEEK_V3 if "```json" in template else _DEEPSEEK_V31
    return _HERMES if _HERMES.opening in template else None


def after_reasoning(end: str, answer: GrammarText | None, vocabulary: ServingVocabulary) -> GrammarText | None:
    """`answer` after a text that ends with the mark `end`; None if the answer is free."""
    if answer is None:
        return None
    mark = _literal(end, vocabulary)
    rules = f"\nreasoning: REASONING {mark}\n" if mark.startswith("<") else f"\nreasoning[lazy]: REASONING {mark}\n"
    parts = {**answer.parts, "answer": f"start: {answer.rule}"}
    return GrammarText(f"reasoning @answer{rules}REASONING: {_TEXT}", parts)


def _literal(text: str, vocabulary: ServingVocabulary) -> str:
    """A text in Lark: control tokens by their ids, everything else as strings."""
    pieces = vocabulary.control_names.pieces(text)
    return " ".join(f"<[{vocabulary.control_tokens[one]}]>" if named else json.dumps(one) for one, named in pieces)
