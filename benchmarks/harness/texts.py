"""Texts to measure with: the built corpus (`make bench-corpus`), or, where it is not there, what every machine has: the
Python files, readmes and licences of this environment, each text once."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pyarrow.parquet as pq

from moray.pipelines.shared.documents import content_hash

BUILT = Path(__file__).resolve().parents[1] / "corpus" / ".cache" / "documents"


def texts(megabytes: float) -> list[str]:
    """About so many megabytes of the built corpus, or of the environment."""
    return texts_in(BUILT, megabytes) if BUILT.is_dir() else texts_of(megabytes)


def texts_in(folder: Path, megabytes: float) -> list[str]:
    """Of the folder's Parquet files about so many megabytes: every n-th document, by its hash, copies and all."""
    columns = [pq.read_table(path, columns=["text"])["text"] for path in sorted(folder.rglob("*.parquet"))]
    every = max(1, round(sum(column.nbytes for column in columns) / (megabytes * 1e6)))
    found = (text for column in columns for text in column.to_pylist())
    return [text for text in found if int(content_hash(text)[:8], 16) % every == 0]


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
