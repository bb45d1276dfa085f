"""Differences between two pieces of plain data, leaf by leaf: configs, addresses, counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A leaf that differs; `field` is a dotted path, and None stands for an absent value."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r:.40} -> {self.new!r:.40}"


def differences(old: Any, new: Any, field: str = "") -> Iterator[Difference]:
    """Yields every leaf that differs. Lists are compared element by element if they have equal length."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{field}.{key}" if field else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{field}.{index}" if field else str(index))
    elif old != new:
        yield Difference(field, old, new)
