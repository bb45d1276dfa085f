"""Evaluation tasks in local files: JSON lines with a prompt, and choices or a schema.

{"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
{"prompt": "A person as JSON: ", "schema": {"type": "object", ...}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moray.platform.core.errors import InputError

MOST_CHOICES = 64


class TaskItem(BaseModel):
    """One line. answer: the index of the right choice."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    prompt: str
    choices: list[str] = Field(default_factory=list, max_length=MOST_CHOICES)
    answer: int | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    id: str = ""

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if (self.schema_ is None) == (not self.choices):
            raise ValueError("give choices with answer, or schema")
        if self.choices and (self.answer is None or not 0 <= self.answer < len(self.choices)):
            raise ValueError(f"answer must be the index of a choice, 0 to {len(self.choices) - 1}")
        if any(not choice for choice in self.choices):
            raise ValueError("a choice is empty")
        return self


def read_task(path: Path) -> list[TaskItem]:
    """The items of a file, all of one kind. Raises InputError with the line."""
    items: list[TaskItem] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "name a file of JSON lines") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(path, number, line))
    if not items:
        raise InputError(f"{path} has no items", "write a line of JSON for each item")
    if len({bool(item.choices) for item in items}) > 1:
        raise InputError(f"{path} has items with choices and items with a schema", "use two files")
    return items


def _item(path: Path, number: int, line: bytes) -> TaskItem:
    try:
        return TaskItem.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {error}"
    raise InputError(f"{path}, line {number}: {reason}", "correct the line")
