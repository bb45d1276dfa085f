"""The output of a reader: documents, and rejects with their reasons."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Meta = tuple[tuple[str, str], ...]


class Document(NamedTuple):
    """key: name within the file, "" if the file is the document. meta: further metadata. numbered: the key is a row's
    number, not its id."""

    key: str
    text: str
    meta: Meta = ()
    numbered: bool = False


class Reject(NamedTuple):
    """A rejected row or record, or, with key "", the file or the rest of it. `detail` is for people."""

    key: str
    reason: str
    detail: str = ""


Piece = Document | Reject

UNREADABLE, MALFORMED, EMPTY, BINARY = "unreadable", "malformed", "empty", "binary"
VALUE = "value"  # a value other than the text; the row is kept
NOT_UTF8, OVERSIZED, HTTP_STATUS, NOT_TEXT, REPEATED_ID = (
    "not_utf8",
    "oversized",
    "http_status",
    "not_text",
    "repeated_id",
)
REASONS = (UNREADABLE, MALFORMED, EMPTY, BINARY, NOT_UTF8, OVERSIZED, HTTP_STATUS, NOT_TEXT, REPEATED_ID, VALUE)


def decode_text(data: bytes, max_bytes: int, key: str, meta: Meta = ()) -> Piece:
    """A document from UTF-8 bytes, or a reject. Line ends become "\\n", and a byte order mark is removed."""
    data = data.removeprefix(b"\xef\xbb\xbf")
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
    """The value as text that UTF-8 can encode. A lone surrogate, which JSON can contain, becomes "?"."""
    return str(value).encode(errors="replace").decode()


class UnrepresentableValue(NamedTuple):
    """A value that neither Python nor JSON can represent, and the reason."""

    reason: str


def meta_of(named: list[tuple[str, Any]]) -> tuple[Meta, list[str]]:
    """Converts (name, value) pairs to strings, and omits nulls.

    An entry of a mapping is named by its key, or `name.key` if that name is taken. Also returns an error text for each
    value that cannot be converted.
    """
    found: dict[str, str] = {}
    lost: list[str] = []
    for name, value in named:
        # Arrow converts a struct to a dict, and a map to a list of pairs.
        is_map = isinstance(value, list) and value and all(isinstance(item, tuple) for item in value)
        pairs = value if is_map else value.items() if isinstance(value, dict) else None
        try:
            if pairs is None:
                _add(found, name, value)
            else:
                for key, item in {_key(key): item for key, item in pairs}.items():
                    _add(found, key if key not in ("path", *found) else f"{name}.{key}", item)
        except Exception as error:  # any error of str or json
            lost.append(f"cannot convert the value of {name!r}: {' '.join(str(error).split())[:150]}")
    return tuple(found.items()), lost


def _text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, list | dict | bool) else str(value)


def _key(value: Any) -> str:
    return _text(value) if isinstance(value, list | dict) else str(value)


def _add(found: dict[str, str], name: str, value: Any) -> None:
    if isinstance(value, UnrepresentableValue):
        raise ValueError(value.reason)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is not None:
        found.setdefault(printable(name), printable(_text(value)))
