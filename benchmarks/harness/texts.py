"""Texts for benchmarks: the built corpus (`make bench-corpus`) or, if it is not built, the texts of this environment.

The texts of the environment are its Python files, readmes and licenses, each text once.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pyarrow.parquet as pq

from moray.pipelines.shared.documents import content_hash

BUILT = Path(__file__).resolve().parents[1] / "corpus" / ".cache" / "documents"


def texts(megabytes: float) -> list[str]:
    """About `megabytes` of text from the built corpus, or from the environment."""
    return texts_in(BUILT, megabytes) if BUILT.is_dir() else texts_of(megabytes)


def texts_in(folder: Path, megabytes: float) -> list[str]:
    """About `megabytes` of text from the folder's Parquet files: every n-th document by hash, including copies."""
    columns = [pq.read_table(path, columns=["text"])["text"] for path in sorted(folder.rglob("*.parquet"))]
    every = max(1, round(sum(column.nbytes for column in columns) / (megabytes * 1e6)))
    found = (text for column in columns for text in column.to_pylist())
    return [text for text in found if int(content_hash(text)[:8], 16) % every == 0]


def texts_of(megabytes: float) -> list[str]:
    """About `megabytes` of text from the environment's packages, then the standard library, each text once."""
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
