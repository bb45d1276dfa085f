"""JSON Schemas that a model can finish: numbers without limits get those of the numbers that programs agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Integers that a double holds exactly (RFC 8259, section 6). A model may otherwise write digits without end.
_LARGEST = (1 << 53) - 1
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")


def bounded_numbers(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, with limits for every integer and number that has none. Raises RecursionError for a schema that is
    nested too deeply."""
    found = dict(schema)
    for key in _MAPS:
        if isinstance(schema.get(key), Mapping):
            found[key] = {name: _bounded(part) for name, part in schema[key].items()}
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            found[key] = [_bounded(part) for part in schema[key]]
    for key in _SINGLE:
        if isinstance(schema.get(key), Mapping):
            found[key] = _bounded(schema[key])
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if ("integer" in kinds or "number" in kinds) and not any(name in schema for name in _LIMITS):
        found |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    return found


def _bounded(part: Any) -> Any:
    return bounded_numbers(part) if isinstance(part, Mapping) else part
