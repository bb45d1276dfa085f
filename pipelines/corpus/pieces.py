"""What a reader makes of a file: documents, and rejects with the reason for each thing left out."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Meta = tuple[tuple[str, str], ...]


class Document(NamedTuple):
    """`key` names it within its file ("" where the file is the document); `meta` is what else is known of it."""

    key: str
    text: str
    meta: Meta = ()


class Reject(NamedTuple):
    """Something left out: a row, a record, or (key "") the file or the rest of it. `detail` is for people."""

    key: str
    reason: str
    detail: str = ""


Piece = Document | Reject

UNREADABLE, MALFORMED, EMPTY, BINARY = "unreadable", "malformed", "empty", "binary"
NOT_UTF8, OVERSIZED, HTTP_STATUS, NOT_TEXT, REPEATED_ID = (
    "not_utf8",
    "oversized",
    "http_status",
    "not_text",
    "repeated_id",
)
REASONS = (UNREADABLE, MALFORMED, EMPTY, BINARY, NOT_UTF8, OVERSIZED, HTTP_STATUS, NOT_TEXT, REPEATED_ID)


def decode(data: bytes, max_bytes: int, key: str, meta: Meta = ()) -> Piece:
    """A document from UTF-8, or why it is none; ends of lines become one."""
    if not data.strip():
        return Reject(key, EMPTY)
    if len(data) > max_bytes:
        return Reject(key, OVERSIZED, f"more than {max_bytes} bytes")
    if b"\0" in data:
        return Reject(key, BINARY)
    try:
        return Document(key, data.decode().replace("\r\n", "\n"), meta)
    except UnicodeDecodeError as error:
        return Reject(key, NOT_UTF8, f"{error.reason} at byte {error.start}")


def printable(value: Any) -> str:
    """Any text that can be written: half a surrogate pair, which JSON can spell, becomes "?"."""
    return str(value).encode(errors="replace").decode()


def meta_of(named: list[tuple[str, Any]]) -> Meta:
    """(name, value) pairs as strings, without nulls; entries of a mapping are named by their keys (else `name.key`)."""
    found: dict[str, str] = {}
    for name, value in named:
        # A struct of Arrow's arrives as a dict, a map as a list of pairs.
        is_map = isinstance(value, list) and value and all(isinstance(item, tuple) for item in value)
        entries = dict(value) if is_map else value
        if isinstance(entries, dict):
            for key, item in entries.items():
                _add(found, str(key) if str(key) not in ("path", *found) else f"{name}.{key}", item)
        else:
            _add(found, name, entries)
    return tuple(found.items())


def _add(found: dict[str, str], name: str, value: Any) -> None:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is not None:
        text = json.dumps(value, default=str) if isinstance(value, list | dict | bool) else str(value)
        found.setdefault(printable(name), printable(text))
