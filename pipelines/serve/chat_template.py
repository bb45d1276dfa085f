"""The chat template of a model folder: the Jinja program that turns messages into a prompt.

Templates are run as transformers runs them (https://huggingface.co/docs/transformers/chat_templating): the same
filters, functions and whitespace rules, in Jinja's sandbox. Text of a message that spells a control token is marked
before it enters the template, so that it becomes plain characters in the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moray.pipelines.serve.name_pattern import NamePattern
from moray.pipelines.shared.chat_files import TEMPLATE
from moray.pipelines.tokenizer.bos import CONFIG, read_object_or_empty

_TOOL_USE = "tool_use"  # name of a template for requests with tools
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text has a use for them
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")

Plain = TypeVar("Plain")


class ChatTemplateError(ValueError):
    """The template cannot be read, or refuses these messages."""


class ArgumentText(str):
    """The arguments of a tool call as JSON. Templates either insert them as text, or with `tojson`, which must not
    quote them again."""


class ChatTemplate:
    """The template of a model. sources: by name; `default` is used, and `tool_use` for requests with tools. tokens: the
    names of control tokens by the variable that holds them. Raises ChatTemplateError for invalid Jinja."""

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"the chat template is invalid: line {error.lineno}: {error.message}") from error
        self.source = "\n".join(sources.values())

    @classmethod
    def load(cls, folder: Path, tokens: Mapping[str, str]) -> ChatTemplate | None:
        """Reads `chat_template.jinja`, or `chat_template` of tokenizer_config.json; None if there is neither. tokens:
        used where tokenizer_config.json names none. Raises ChatTemplateError."""
        try:
            config = read_object_or_empty(folder / CONFIG)
            sources = _sources(folder, config)
        except (OSError, ValueError) as error:
            raise ChatTemplateError(f"the chat template cannot be read: {error}") from error
        return cls(sources, {**tokens, **_named_tokens(config)}) if sources else None

    @property
    def has_tools(self) -> bool:
        return _TOOL_USE in self._templates or re.search(r"\btools\b", self.source) is not None

    def uses(self, variable: str) -> bool:
        """Whether the template reads a variable."""
        return re.search(rf"\b{re.escape(variable)}\b", self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt. Raises ChatTemplateError with the template's own message."""
        name = _TOOL_USE if tools and _TOOL_USE in self._templates else "default"
        given: dict[str, Any] = {**self._tokens, "messages": messages, "tools": list(tools) or None, "documents": None}
        given |= {"add_generation_prompt": add_generation_prompt, **(variables or {})}
        try:
            return str(self._templates[name].render(given))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            raise ChatTemplateError(f"the model's chat template refuses these messages: {message}") from error
        except RecursionError as error:
            raise ChatTemplateError("the messages are nested too deeply") from error


def plain_text(values: Plain, names: NamePattern) -> tuple[Plain, str]:
    """`values` (JSON) with a mark inside each of the names in its texts, and the mark, which nothing else contains.

    Raises ChatTemplateError if no mark is left.
    """
    text = json.dumps(values, ensure_ascii=False)
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise ChatTemplateError("the messages contain all of the noncharacters U+FDD0 to U+FDEF")

    def change(text: str) -> str:
        return "".join(piece[:1] + mark + piece[1:] if named else piece for piece, named in names.pieces(text))

    return cast(Plain, _map_texts(values, change)), mark


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return type(value)(change(value))
    if isinstance(value, Mapping):
        return {change(key): _map_texts(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(part, change) for part in value]
    return value


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Raises ValueError."""
    if (folder / TEMPLATE).is_file():
        return {"default": (folder / TEMPLATE).read_text("utf-8")}
    given = config.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    named = {one["name"]: one["template"] for one in given} if _are_named(given) else {}
    if "default" not in named:
        raise ValueError(f"{CONFIG}: chat_template must be a text, or a list of named ones with `default`")
    return named


def _are_named(given: Any) -> bool:
    return isinstance(given, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in given
    )


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {name: config.get(name) for name in _NAMES}
    texts = {name: one.get("content") if isinstance(one, dict) else one for name, one in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class _Generation(Extension):
    """`{% generation %}`, which marks an assistant's text for training; it has no effect on a prompt."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(value, ArgumentText):
        value = json.loads(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
