"""`response_format` of OpenAI's API, and `structured_outputs` of vLLM's: what form an answer has."""

from __future__ import annotations

import json
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moray.pipelines.serve.grammar import GrammarText, of_choice, of_grammar, of_regex, of_schema

LARGEST = 1 << 18  # characters of a schema, a grammar, a regular expression, or all choices
_GRAMMAR = 1 << 16  # of a grammar, which is converted in Python
_MOST_CHOICES = 20_000


class JsonSchema(BaseModel):
    """`json_schema` of a response_format."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field("answer", max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(..., alias="schema")
    strict: bool | None = None  # answers always follow the schema

    @field_validator("schema_")
    @classmethod
    def _size(cls, value: dict[str, Any] | bool) -> dict[str, Any] | bool:
        return checked_schema(value)


class ResponseFormat(BaseModel):
    """`response_format`: text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema must be given with type json_schema, and only then")
        return self

    def grammar(self) -> GrammarText | None:
        """What the answer follows; None for text. Raises RecursionError."""
        if self.json_schema is not None:
            return of_schema(self.json_schema.schema_)
        return of_schema({"type": "object"}) if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """`structured_outputs`: exactly one of its fields. grammar: in Lark's or llama.cpp's notation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=LARGEST)
    choice: tuple[str, ...] | None = Field(None, max_length=_MOST_CHOICES)
    grammar_: str | None = Field(None, alias="grammar", max_length=_GRAMMAR)
    json_object: Literal[True] | None = None

    @field_validator("json_")
    @classmethod
    def _json(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise PydanticCustomError("json", "is a string that is not JSON") from None
            if not isinstance(value, dict | bool):
                raise PydanticCustomError("json", "must be a JSON Schema: an object")
        return None if value is None else checked_schema(value)

    @field_validator("choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise PydanticCustomError("choice", "must be a list of strings, none of them empty")
        if sum(map(len, value)) > LARGEST:
            raise PydanticCustomError("choice", f"may have up to {LARGEST:,} characters in all")
        return tuple(value)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [one for one in (self.json_, self.regex, self.choice, self.grammar_, self.json_object)]
        if sum(one is not None for one in given) != 1:
            raise PydanticCustomError("one", "must have exactly one of json, regex, choice, grammar, json_object")
        return self

    def grammar(self) -> GrammarText:
        """What the answer follows. Raises GrammarError, RecursionError."""
        if self.regex is not None:
            return of_regex(self.regex)
        if self.choice is not None:
            return of_choice(self.choice)
        if self.grammar_ is not None:
            return of_grammar(self.grammar_)
        schema = {"type": "object"} if self.json_ is None else self.json_
        assert not isinstance(schema, str)
        return of_schema(schema)


Schema = TypeVar("Schema", dict[str, Any], bool, dict[str, Any] | bool)


def checked_schema(value: Schema) -> Schema:
    """A schema of a size that may be compiled. Raises a pydantic error."""
    try:
        size = len(json.dumps(value))
    except RecursionError:
        raise PydanticCustomError("schema", "is nested too deeply") from None
    if size > LARGEST:
        raise PydanticCustomError("schema", f"has {size:,} characters, of up to {LARGEST:,}")
    return value
