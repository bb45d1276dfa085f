"""What differs between two pieces of plain data, leaf by leaf: configs, addresses, counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A leaf that differs; `field` is dotted, and None stands for what is not there."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r:.40} -> {self.new!r:.40}"


def differences(old: Any, new: Any, field: str = "") -> Iterator[Difference]:
    """Every leaf that differs. Lists are compared place by place if they are equally long."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{field}.{key}" if field else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{field}.{place}" if field else str(place))
    elif old != new:
        yield Difference(field, old, new)
