"""`${env:NAME}` and `${file:PATH}` in a recipe: values that are used but never written to disk. `${model:ALIAS|ALIAS}`
stands for the folder of the first of these aliases that exists.

Two kinds of fields accept references. A field of type `Secret` holds exactly one reference; the step calls `reveal()`.
A field marked `operational` receives the value (`path: ${env:DATA}/text`). Manifests, plans, errors and result files
show the reference as written. The fingerprint of a secret is also that of its reference, so a new password makes no new
artifact. Other fields reject references, because their values must be in the fingerprint and the manifest.

Events and errors of a step could still quote a value; a `Redactor` replaces it with the reference.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from moray.platform.core.errors import MorayError

REFERENCE = re.compile(r"\$\{((?:env|file|store|model):[^}]*)\}")
# Bring a tree of files, or the artifact of the first known alias, to this host and return its path; set by the package
# that knows the store.
bring_stored: Callable[[str], Path] | None = None
bring_alias: Callable[[str], Path] | None = None
# Shorter values would match inside unrelated words of a message, so they cannot be redacted.
SHORTEST = 6
_LONGEST_FILE = 64 * 1024


class Secret:
    """A secret value. `reveal()` returns it; everywhere else it appears as the text of its reference."""

    __slots__ = ("_value", "reference")

    def __init__(self, reference: str, value: str) -> None:
        self.reference = reference
        self._value = value

    def reveal(self) -> str:
        """Returns the value. Pass it directly to its consumer; never write it to a file, a log or an event."""
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
        """Resolves the secret that `written` refers to. Raises an error that pydantic reports at the field."""
        if isinstance(written, Secret):
            return written
        whole = REFERENCE.fullmatch(written) if isinstance(written, str) else None
        if whole is None:
            raise _mistake(
                "a secret must be a reference, not plain text", "write ${env:NAME} or ${file:PATH}, and nothing else"
            )
        value = resolve(whole.group(1))
        if len(value) < SHORTEST:
            raise _mistake(f"the value of {written} is too short for a secret", f"use at least {SHORTEST} characters")
        return cls(whole.group(), value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema(when_used="always")
        )


def resolve(reference: str) -> str:
    """Returns the value of `env:NAME` or `file:PATH` (the file's text without its final newline), or the path to which
    the files of `store:ADDRESS` or `model:ALIAS|ALIAS` are brought."""
    kind, _, name = reference.partition(":")
    shown = f"${{{reference}}}"
    if kind == "env":
        if name not in os.environ:
            raise _mistake(f"{shown}: environment variable {name} is not set", f"export {name}=...")
        return os.environ[name]
    if kind == "store":
        if bring_stored is None:
            raise _mistake(f"{shown}: no store is known", "run the recipe with `moray submit`")
        return str(bring_stored(name))
    if kind == "model":
        return _of_alias(name, shown)
    path = Path(name).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_FILE + 1)
        if len(data) > _LONGEST_FILE:
            raise _mistake(
                f"{shown}: the file is larger than {_LONGEST_FILE:,} bytes", "the file must contain only the value"
            )
        return data.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise _mistake(f"{shown}: {error.strerror}", "the file must contain only the value") from error
    except UnicodeDecodeError as error:
        raise _mistake(f"{shown}: the file is not UTF-8 text", "the file must contain only the value") from error


def _of_alias(names: str, shown: str) -> str:
    if bring_alias is None:
        raise _mistake(f"{shown}: no store is known", "run the recipe with `moray run` or `moray submit`")
    try:
        return str(bring_alias(names))
    except MorayError as error:
        raise _mistake(f"{shown}: {error.message}", error.hint) from error


def _mistake(message: str, hint: str) -> PydanticCustomError:
    """An error that pydantic reports at the field; platform/plan/recipe.py passes its hint on."""
    return PydanticCustomError("reference", "{message}", {"message": message, "hint": hint})


def substitute(written: Any) -> Any:
    """Replaces the references in `written` (recipe data) by their values, at any depth."""
    if isinstance(written, dict):
        return {key: substitute(item) for key, item in written.items()}
    if isinstance(written, list | tuple):
        return [substitute(item) for item in written]
    if isinstance(written, str):
        return REFERENCE.sub(lambda match: resolve(match.group(1)), written)
    return written


def references_in(value: Any) -> list[str]:
    """Returns the references (`env:NAME`) in plain data, in order. Nested models check their own fields."""
    if isinstance(value, Mapping):
        return [name for item in value.values() for name in references_in(item)]
    if isinstance(value, list | tuple | set | frozenset):
        return [name for item in value for name in references_in(item)]
    return REFERENCE.findall(str(value)) if isinstance(value, str | Path) else []


def refuse(value: Any) -> None:
    """Raises if `value`, of a field that enters the fingerprint, contains a reference."""
    if found := references_in(value):
        raise _mistake(
            f"${{{found[0]}}} is not allowed here: the value affects the result, so it must be in the manifest",
            "write the value, or pass it with --set; only paths, other operational fields and secrets take references",
        )


class Redactor:
    """Replaces every value that came from a reference by that reference, anywhere in a text."""

    def __init__(self, references: Mapping[str, str] | None = None) -> None:
        """`references`: value -> reference text. Values shorter than SHORTEST characters are ignored."""
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
        """Returns a redactor for every reference in `configs`, at any depth."""
        return cls({value: reference for config in configs for value, reference in _values(config)})


@contextmanager
def redacting(redact: Redactor) -> Iterator[None]:
    """Redacts the message and hint of a MorayError raised inside the block."""
    try:
        yield
    except MorayError as error:
        error.message, error.hint = redact(error.message), redact(error.hint)
        error.args = (error.message,)
        raise


def _values(value: Any) -> Iterable[tuple[str, str]]:
    """Yields (value, reference text) for every reference in a config."""
    if isinstance(value, Secret):
        yield value.reveal(), value.reference
    elif isinstance(value, BaseModel):
        for name in references_in(getattr(value, "_written", {})):
            yield resolve(name), f"${{{name}}}"
        for field in type(value).model_fields:
            yield from _values(getattr(value, field))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _values(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _values(item)
