"""Parses and formats sizes: 10GB, 512 MiB."""

from __future__ import annotations

import re

from moray.platform.core.errors import InputError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Parses `10GB` (decimal), `10GiB` (binary) or `1000000` to bytes. Raises InputError."""
    match = _SIZE.fullmatch(text.strip())
    scale = None
    if match:
        scale = (_BINARY if match.group(3) else _DECIMAL).get(match.group(2).lower())
    if match is None or scale is None:
        raise InputError(f"invalid size {text!r}", "use for example 500MB, 10GB or 1.5TiB")
    return int(float(match.group(1)) * scale)


def size(value: float) -> str:
    """Formats bytes with three digits and a decimal unit: 512 B, 1.25 MB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}" if value < 999.5 * limit else f"{value / limit:.0f} {unit}"
    return f"{value:.0f} B"
