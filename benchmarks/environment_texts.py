"""A corpus that every machine has: the Python files, readmes and licences of this environment, each text once."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from moray.pipelines.documents import content_hash


def texts_of(megabytes: float) -> list[str]:
    """Of the environment's packages, then of the standard library, each text once."""
    found: dict[str, str] = {}
    size = 0
    for root in ("purelib", "stdlib"):
        for path in sorted(Path(sysconfig.get_path(root)).rglob("*")):
            if path.suffix not in (".py", ".md", ".rst", ".txt", "") or not path.is_file() or "/test" in str(path):
                continue
            if root == "stdlib" and "site-packages" in path.parts:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if 400 <= len(text) <= 200_000 and content_hash(text) not in found:
                found[content_hash(text)] = text
                size += len(text.encode())
            if size > megabytes * 1e6:
                return list(found.values())
    return list(found.values())
