"""Matches names that are not paths on disk, such as the keys of a bucket, against pathlib's patterns."""

from __future__ import annotations

import re
from functools import lru_cache


def matches(key: str, pattern: str) -> bool:
    """Whether `Path.glob(pattern)` would find a file `key` below its folder."""
    return _compiled(pattern).fullmatch(key) is not None


def may_match_below(key: str, pattern: str, by_any: bool = False) -> bool:
    """Whether the pattern may match a file below a folder `key`. by_any: also if only its `**` matches the folder."""
    names, parts = key.split("/"), _parts(pattern)
    for name, part in zip(names, parts, strict=False):
        if part == "**":
            return by_any
        if not _compiled_part(part).fullmatch(name):
            return False
    return len(names) < len(parts)


def pattern_error(pattern: str) -> str:
    """The problem with a pattern that can match no file of the source; '' if there is none."""
    parts = pattern.split("/")
    if not pattern.strip():
        return "an empty pattern matches nothing; '**/*' matches every file"
    if pattern.startswith(("/", "~")) or ".." in parts or "\0" in pattern:
        return f"{pattern!r} leads outside the source's location: use a path relative to it, such as 'sub/*.txt'"
    if any("**" in part and part != "**" for part in parts):
        return f"{pattern!r}: '**' must be a whole path component: did you mean {_corrected(parts)!r}?"
    if parts[-1] in ("", ".", "**"):
        return f"{pattern!r} matches only folders: did you mean {'/'.join([*parts[:-1], '**/*'])!r}?"
    return ""


def _corrected(parts: list[str]) -> str:
    found = []
    for part in parts:
        if "**" in part and part != "**":
            found += ["**", part.replace("**", "*")]
        else:
            found.append(part)
    return "/".join(found)


# A listing matches the same few patterns against each of its files and folders, which may be millions.
@lru_cache(maxsize=256)
def _parts(pattern: str) -> tuple[str, ...]:
    return tuple(part for part in pattern.split("/") if part not in ("", "."))


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = _parts(pattern)
    # A key of a bucket may have empty parts: a double slash, or a leading one.
    written = ["(?:[^/]*/)*" if part == "**" else _part(part) + "/" for part in parts]
    return re.compile("".join(written).removesuffix("/"), re.S)


@lru_cache(maxsize=1024)
def _compiled_part(part: str) -> re.Pattern[str]:
    return re.compile(_part(part), re.S)


def _part(part: str) -> str:
    """The regular expression of one path component: * and ? match no slash, [abc] and [!abc] match one character."""
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
