"""What a kernel that calls others in other files is made of: part of the name that its compiled form is kept under.

numba keeps what it has compiled by the function's own file, and does not look at what it calls: after a change there it
would go on running what was. But it does look at what a function closes over. So a kernel that others are compiled into
is made by a function of `sources(...)`, and those others are not kept by themselves.
"""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path


def sources(*modules: str) -> int:
    """A checksum of the files of these modules, by their dotted names; they are not imported."""
    found = 0
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(name)
        found = zlib.crc32(Path(spec.origin).read_bytes(), found)
    return found
