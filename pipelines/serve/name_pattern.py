"""Finds the names of control tokens in texts of clients, in time that does not grow with the number of names.

Notable: `re` holds the GIL while it searches. With an alternation of DeepSeek-V3's 800 names it takes a second for a
megabyte that is full of their beginnings, so the pattern is a tree of common beginnings, and searches a window at a
time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

_WINDOW = 1 << 16  # characters of a search


class NamePattern:
    """names: of which the longest one is found, where several begin."""

    def __init__(self, names: Iterable[str]) -> None:
        found = sorted({name for name in names if name})
        self._longest = max(map(len, found), default=0)
        self._pattern = re.compile(_tree(found)) if found else None

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """The parts of a text, none of them empty, and whether each is a name."""
        begin = place = 0
        while self._pattern is not None and place < len(text):
            found = self._pattern.search(text, place, place + _WINDOW + self._longest)
            if found is None or found.start() >= place + _WINDOW:  # which may be cut
                place += _WINDOW
                continue
            if found.start() > begin:
                yield text[begin : found.start()], False
            yield found[0], True
            begin = place = found.end()
        if begin < len(text):
            yield text[begin:], False


def _tree(names: list[str]) -> str:
    """An expression for any of the names, which are sorted and different."""
    prefix = os.path.commonprefix(names)  # noqa: RUF071 (character by character is what is wanted)
    groups: dict[str, list[str]] = {}
    for name in names:
        if len(name) > len(prefix):
            groups.setdefault(name[len(prefix)], []).append(name[len(prefix) :])
    if not groups:
        return re.escape(prefix)
    rest = "|".join(_tree(group) for group in groups.values())
    return f"{re.escape(prefix)}(?:{rest}){'?' if prefix in names else ''}"
