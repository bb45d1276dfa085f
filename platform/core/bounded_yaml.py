"""YAML from outside, looked at before anything walks it.

A few hundred bytes of YAML can unfold into gigabytes (aliases of aliases), nest deeper than a stack (libyaml composes
by recursion, and the process ends), or contain themselves. The parser's events come one at a time, so depth, size and
aliases are counted first, in time and memory of the text.
"""

from __future__ import annotations

from typing import Any

import yaml

from moray.platform.core.errors import RecipeError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where yaml was built with it
MOST_BYTES = 1 << 20
DEEPEST = 64
MOST_NODES = 200_000  # aliases unfolded


def compose(text: str) -> tuple[yaml.Node | None, Any]:
    """The tree of nodes, with their places, and the value. Raises RecipeError for what is out of bounds, yaml.YAMLError
    for what is no YAML, ValueError for a scalar that cannot be read."""
    check_bounds(text)
    return yaml.compose(text, Loader=LOADER), yaml.load(text, Loader=LOADER)


def check_bounds(text: str) -> None:
    """Raises RecipeError, naming the line, for text that is too large, deep, unfolds too far or contains itself."""
    if len(text) > MOST_BYTES:
        raise RecipeError(f"{len(text):,} characters of YAML are more than {MOST_BYTES:,}", "split it")
    count = _Count()
    for event in yaml.parse(text, Loader=LOADER):
        try:
            count.take(event)
        except RecipeError as error:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise RecipeError(f"line {line}: {error.message}", error.hint) from None


class _Count:
    """Of the values that a text unfolds to, event by event."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # of what anchors name
        self._open: list[tuple[str | None, int]] = []  # anchor, and size so far, of what is being read

    def take(self, event: Any) -> None:
        """Raises RecipeError where a bound is passed."""
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._open.append((event.anchor, 1))
            if len(self._open) > DEEPEST:
                raise RecipeError(f"nested deeper than {DEEPEST} levels", "flatten it")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._add(*self._open.pop())
        elif isinstance(event, yaml.ScalarEvent):
            if event.tag == "tag:yaml.org,2002:binary":
                raise RecipeError("!!binary is no value of a recipe", "write it as text")
            self._add(event.anchor, 1)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in self._open):
                raise RecipeError(f"*{event.anchor} stands within itself", "name another anchor")
            self._add(None, self._sizes.get(str(event.anchor), 1))

    def _add(self, anchor: str | None, size: int) -> None:
        """Something whole was read."""
        if anchor:
            self._sizes[anchor] = size
        if self._open:
            outer, inner = self._open[-1]
            size += inner
            self._open[-1] = (outer, size)
        if size > MOST_NODES:
            raise RecipeError(f"it unfolds into more than {MOST_NODES:,} values", "write fewer aliases")
