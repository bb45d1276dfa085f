"""`${env:NAME}` and `${file:PATH}` in a recipe: values that are used and never written down.

Two places take them. A field of type `Secret` holds one reference and nothing else; the step calls `reveal()`. A field
marked `operational` is given the value (`path: ${env:DATA}/text`). Whatever shows a config (manifest, plan, error,
result file) shows the reference as written, so it is also what the fingerprint of a secret sees: a new password makes
no new artifact. Any other field refuses them, because its value would have to be in the fingerprint and the manifest.

What a step says in events and errors could still quote a value; a `Redactor` puts the reference in its place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from moray.platform.core.errors import MorayError

REFERENCE = re.compile(r"\$\{((?:env|file):[^}]*)\}")
# Shorter values would be found inside unrelated words of a message, so they cannot be kept out of one.
SHORTEST = 6
_LONGEST_FILE = 64 * 1024


class Secret:
    """A value that shows itself only when asked: everywhere else it is the text of its reference."""

    __slots__ = ("_value", "reference")

    def __init__(self, reference: str, value: str) -> None:
        self.reference = reference
        self._value = value

    def reveal(self) -> str:
        """The value. Give it to what needs it at once; never into a file, a log or an event."""
        return self._value

    def __str__(self) -> str:
        return self.reference

    def __repr__(self) -> str:
        return f"Secret({self.reference!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.reference == self.reference

    def __hash__(self) -> int:
        return hash(self.reference)

    @classmethod
    def parse(cls, written: Any) -> Secret:
        """The secret that `written` refers to, read now. Raises what pydantic reports at the field."""
        if isinstance(written, Secret):
            return written
        whole = REFERENCE.fullmatch(written) if isinstance(written, str) else None
        if whole is None:
            raise _mistake(
                "a secret is given by reference, never in plain", "write ${env:NAME} or ${file:PATH}, and nothing else"
            )
        value = resolve(whole.group(1))
        if len(value) < SHORTEST:
            raise _mistake(f"{written} is too short for a secret", f"a secret has at least {SHORTEST} characters")
        return cls(whole.group(), value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema(when_used="always")
        )


def resolve(reference: str) -> str:
    """The value of `env:NAME` or `file:PATH` (its text without the last line end)."""
    kind, _, name = reference.partition(":")
    shown = f"${{{reference}}}"
    if kind == "env":
        if name not in os.environ:
            raise _mistake(f"{shown}: the environment has no {name}", f"export {name}=...")
        return os.environ[name]
    path = Path(name).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_FILE + 1)
        if len(data) > _LONGEST_FILE:
            raise _mistake(f"{shown}: the file has more than {_LONGEST_FILE:,} bytes", "one file holds one value")
        return data.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise _mistake(f"{shown}: {error.strerror}", "the file holds the value and nothing else") from error
    except UnicodeDecodeError as error:
        raise _mistake(f"{shown}: the file is not UTF-8 text", "the file holds the value and nothing else") from error


def _mistake(message: str, hint: str) -> PydanticCustomError:
    """Reported at its field; platform/plan/recipe.py turns the hint into the error's hint."""
    return PydanticCustomError("reference", "{message}", {"message": message, "hint": hint})


def substitute(written: Any) -> Any:
    """`written` (recipe data) with the values of its references, at any depth."""
    if isinstance(written, dict):
        return {key: substitute(item) for key, item in written.items()}
    if isinstance(written, list | tuple):
        return [substitute(item) for item in written]
    if isinstance(written, str):
        return REFERENCE.sub(lambda match: resolve(match.group(1)), written)
    return written


def found_in(value: Any) -> list[str]:
    """The references (`env:NAME`) in plain data, in order. Models inside it look after their own fields."""
    if isinstance(value, Mapping):
        return [name for item in value.values() for name in found_in(item)]
    if isinstance(value, list | tuple | set | frozenset):
        return [name for item in value for name in found_in(item)]
    return REFERENCE.findall(str(value)) if isinstance(value, str | Path) else []


def refuse(value: Any) -> None:
    """Raises if `value`, of a field that decides the result, holds a reference."""
    if found := found_in(value):
        raise _mistake(
            f"${{{found[0]}}} cannot stand here: the value decides the result, so it must be known to the manifest",
            "write the value, or give it with --set; references are for paths, other operational fields and secrets",
        )


class Redactor:
    """Puts the reference in the place of every value that came by one, wherever it occurs in a text."""

    def __init__(self, references: Mapping[str, str] | None = None) -> None:
        """`references`: value -> reference text. Values under SHORTEST characters are left alone."""
        spelled = {
            spelling: reference
            for value, reference in (references or {}).items()
            if len(value) >= SHORTEST
            for spelling in (value, json.dumps(value)[1:-1], repr(value)[1:-1])
        }
        self._references = spelled
        longest_first = sorted(spelled, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if spelled else None

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._references[match.group()], text) if self._pattern else text

    @classmethod
    def of(cls, configs: Iterable[BaseModel]) -> Redactor:
        """Knows every reference in `configs`, at any depth."""
        return cls({value: reference for config in configs for value, reference in _values(config)})


@contextmanager
def redacting(redact: Redactor) -> Iterator[None]:
    """Within it, an error for people names references instead of their values."""
    try:
        yield
    except MorayError as error:
        error.message, error.hint = redact(error.message), redact(error.hint)
        error.args = (error.message,)
        raise


def _values(value: Any) -> Iterable[tuple[str, str]]:
    """(value, reference text) of every reference in a config."""
    if isinstance(value, Secret):
        yield value.reveal(), value.reference
    elif isinstance(value, BaseModel):
        for name in found_in(getattr(value, "_written", {})):
            yield resolve(name), f"${{{name}}}"
        for field in type(value).model_fields:
            yield from _values(getattr(value, field))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _values(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _values(item)
