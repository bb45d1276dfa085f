"""pathlib's patterns for names that are in no folder, such as the keys of a bucket."""

from __future__ import annotations

import re
from functools import lru_cache


def matches(key: str, pattern: str) -> bool:
    """Whether `Path.glob(pattern)` would find a file `key` below its folder."""
    return _compiled(pattern).fullmatch(key) is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    written = ["(?:[^/]+/)*" if part == "**" else _part(part) + "/" for part in parts]
    return re.compile("".join(written).removesuffix("/"), re.S)


def _part(part: str) -> str:
    """One name of a pattern: * and ? stay within it, [abc] and [!abc] are one character."""
    found, at = "", 0
    while at < len(part):
        closing = part.find("]", at + 2) if part[at] == "[" else -1
        if closing > 0:
            inner = part[at + 1 : closing].replace("\\", r"\\")
            inner = f"^{inner[1:]}" if inner[0] == "!" else inner.replace("^", r"\^")
            found, at = f"{found}[{inner}]", closing + 1
        else:
            found += {"*": "[^/]*", "?": "[^/]"}.get(part[at], re.escape(part[at]))
            at += 1
    return found
