"""Parses untrusted YAML within bounds on size, depth and alias expansion.

A few hundred bytes of YAML can expand to gigabytes (aliases of aliases), overflow the stack by nesting (libyaml
composes recursively, so the process crashes), or contain themselves. This module checks the parser's event stream
first, in time and memory linear in the text.
"""

from __future__ import annotations

from typing import Any

import yaml

from moray.platform.core.errors import RecipeError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where yaml was built with it
MOST_BYTES = 1 << 20
DEEPEST = 64
MOST_NODES = 200_000  # with aliases expanded


def compose(text: str) -> tuple[yaml.Node | None, Any]:
    """Returns the node tree, with line numbers, and the parsed value. Raises RecipeError if a bound is exceeded,
    yaml.YAMLError for invalid YAML, ValueError for a scalar that cannot be converted."""
    check_bounds(text)
    return yaml.compose(text, Loader=LOADER), yaml.load(text, Loader=LOADER)


def check_bounds(text: str) -> None:
    """Raises RecipeError, naming the line, if the text is too large, also when expanded, too deep, or recursive."""
    if len(text) > MOST_BYTES:
        raise RecipeError(f"the YAML has {len(text):,} characters; the limit is {MOST_BYTES:,}", "split it")
    count = _Count()
    for event in yaml.parse(text, Loader=LOADER):
        try:
            count.take(event)
        except RecipeError as error:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise RecipeError(f"line {line}: {error.message}", error.hint) from None


class _Count:
    """Counts the values a text expands to, event by event."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # by anchor
        self._open: list[tuple[str | None, int]] = []  # anchor and size so far of each open collection

    def take(self, event: Any) -> None:
        """Processes one event. Raises RecipeError if a bound is exceeded."""
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._open.append((event.anchor, 1))
            if len(self._open) > DEEPEST:
                raise RecipeError(f"nested deeper than {DEEPEST} levels", "flatten it")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._add(*self._open.pop())
        elif isinstance(event, yaml.ScalarEvent):
            if event.tag == "tag:yaml.org,2002:binary":
                raise RecipeError("!!binary is not supported in a recipe", "write the value as text")
            self._add(event.anchor, 1)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in self._open):
                raise RecipeError(f"*{event.anchor} contains itself", "name another anchor")
            self._add(None, self._sizes.get(str(event.anchor), 1))

    def _add(self, anchor: str | None, size: int) -> None:
        """Adds a complete value to the enclosing collection."""
        if anchor:
            self._sizes[anchor] = size
        if self._open:
            outer, inner = self._open[-1]
            size += inner
            self._open[-1] = (outer, size)
        if size > MOST_NODES:
            raise RecipeError(f"aliases expand to more than {MOST_NODES:,} values", "use fewer aliases")
