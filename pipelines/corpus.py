"""corpus: directories of text and code, JSON lines and Parquet files into Documents.

Files are listed and sorted once, grouped into shards by size, and read by Ray Data tasks; what is left out is counted
by reason. A document's id depends on the source's name and the file's path within it, not on where the source lies.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from moray.pipelines.documents import SCHEMA, document_id, shard_name, write_batches
from moray.pipelines.readers import DEFAULT_COLUMNS, READERS, Columns
from moray.pipelines.shards import Row, map_shards
from moray.platform.errors import InputError, RecipeError
from moray.platform.manifest import hash_file
from moray.platform.step import Estimate, ExternalFile, Step, StepConfig, StepContext, Topology, operational

_ROW_READERS = ("jsonl", "parquet")
_BATCH_BYTES = 32_000_000  # of text held by a task before it is written


class Source(StepConfig):
    """One origin of documents: a folder or file (`path`), or an installed Python package (`package`)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    path: Path | None = operational(None)
    package: str | None = operational(None)
    reader: Literal["text", "jsonl", "parquet", "pythonbible"] = "text"
    text_column: str = Field(DEFAULT_COLUMNS.text, min_length=1, description="jsonl, parquet: where the text is")
    id_column: str | None = Field(None, min_length=1, description="jsonl, parquet: what names a row; else its number")
    include: tuple[str, ...] = ("**/*",)
    exclude: tuple[str, ...] = ()
    license: str = ""
    max_files: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.package is None):
            raise ValueError("give `path` or `package`, one of them")
        if self.reader not in _ROW_READERS and (self.text_column, self.id_column) != (DEFAULT_COLUMNS.text, None):
            raise ValueError(f"`text_column` and `id_column` are for {' and '.join(_ROW_READERS)}, not {self.reader}")
        return self

    def root(self) -> Path:
        """The folder (or file) on this machine. Raises InputError if it is not there."""
        if self.path is not None:
            root = self.path.expanduser()
            if not root.exists():
                raise InputError(f"source {self.name!r}: {root} does not exist", "correct the path in the recipe")
            return root.absolute()
        spec = importlib.util.find_spec(str(self.package))
        if spec is None or spec.origin is None:
            raise InputError(f"source {self.name!r}: no package {self.package!r}", f"pip install {self.package}")
        return Path(spec.origin).parent

    def files(self) -> list[tuple[str, Path]]:
        """(key, path) of every file, sorted by key; the key is the path relative to the root, with slashes."""
        root = self.root()
        if root.is_file():
            return [(root.name, root)]
        excluded = {path for pattern in self.exclude for path in root.glob(pattern)}
        found = {
            path.relative_to(root).as_posix(): path
            for pattern in self.include
            for path in root.glob(pattern)
            if path not in excluded and "__pycache__" not in path.parts and path.is_file() and not path.is_symlink()
        }
        return sorted(found.items())[: self.max_files]


class CorpusConfig(StepConfig):
    sources: tuple[Source, ...] = Field(min_length=1)
    max_document_bytes: int = Field(1_000_000, gt=0)
    shard_bytes: int = Field(4_000_000, gt=0)


class Corpus(Step[CorpusConfig]):
    name: ClassVar[str] = "corpus"
    version: ClassVar[int] = 1
    Config = CorpusConfig
    produces: ClassVar[str] = "documents"
    needs_ray: ClassVar[bool] = True

    def check(self, config: CorpusConfig, inputs: Mapping[str, str]) -> None:
        names = Counter(source.name for source in config.sources)
        if repeated := [name for name, n in names.items() if n > 1]:
            raise RecipeError(f"sources: the name {repeated[0]!r} is used twice", "give every source its own name")
        for i, source in enumerate(config.sources):
            try:
                files = source.files()
            except InputError as error:
                raise RecipeError(f"sources.{i}: {error.message}", error.hint) from error
            if not files:
                raise RecipeError(
                    f"sources.{i}: source {source.name!r}: no file matches {list(source.include)} in {source.root()}",
                    "correct `include` or `path`",
                )

    def external(self, config: CorpusConfig) -> list[ExternalFile]:
        return [
            ExternalFile(source.name, key, path.stat().st_size, _sha256(path))
            for source in config.sources
            for key, path in source.files()
        ]

    def estimate(self, config: CorpusConfig, topology: Topology) -> Estimate:
        size = sum(path.stat().st_size for source in config.sources for _, path in source.files())
        return Estimate(seconds=size / 20e6 / topology.cpus)

    def run(self, ctx: StepContext[CorpusConfig]) -> None:
        shards = _shards(ctx.config)
        write = partial(_write, folder=str(ctx.folder), max_bytes=ctx.config.max_document_bytes)
        rows = map_shards(ctx, "reading", shards, write, "files", lambda row: len(row["files"]))
        dropped: Counter[str] = Counter()
        for row in rows:
            dropped.update({key.removeprefix("dropped:"): n for key, n in row.items() if key.startswith("dropped:")})
        documents = sum(row["documents"] for row in rows)
        if not documents:
            raise InputError("the corpus has no usable document", f"left out: {dict(dropped)}")
        ctx.counts |= {
            "in:files": sum(len(shard["files"]) for shard in shards),
            "out:documents": documents,
            "bytes": sum(row["bytes"] for row in rows),
            **{f"dropped:{reason}": n for reason, n in sorted(dropped.items()) if n},
        }
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()) if n)
        ctx.outcome = f"{ctx.counts['bytes'] / 1e6:.1f} MB" + (f"; left out {reasons}" if reasons else "")


def _shards(config: CorpusConfig) -> list[Row]:
    """Groups each source's files, in order, into shards of about `shard_bytes`."""
    shards: list[Row] = []
    for source in config.sources:
        size = config.shard_bytes  # so that every source begins a shard
        for key, path in source.files():
            if size >= config.shard_bytes:
                shards.append({"shard": len(shards), "files": [], "keys": [], **_description(source)})
                size = 0
            shards[-1]["files"].append(str(path))
            shards[-1]["keys"].append(key)
            size += path.stat().st_size
    return shards


def _description(source: Source) -> Row:
    """What a task must know of a source, as strings: Ray Data rows are Arrow, where a None may lose its column."""
    return {
        "source": source.name,
        "license": source.license,
        "reader": source.reader,
        "text_column": source.text_column,
        "id_column": source.id_column or "",
    }


def _write(shard: Row, folder: str, max_bytes: int) -> Row:
    """Reads one shard's files and writes its Parquet file. Runs in a Ray worker."""
    counts: Counter[str] = Counter({"documents": 0, "bytes": 0, **{f"dropped:{reason}": 0 for reason in _REASONS}})
    write_batches(Path(folder) / shard_name(shard["shard"]), SCHEMA, _tables(shard, max_bytes, counts))
    return {"shard": shard["shard"], **counts}


def _tables(shard: Row, max_bytes: int, counts: Counter[str]) -> Iterator[pa.Table]:
    """The shard's documents, a batch at a time; adds to `counts` on the way."""
    reader, columns = READERS[shard["reader"]], Columns(shard["text_column"], shard["id_column"] or None)
    rows: list[tuple[str, str]] = []
    held = 0
    for key, path in zip(shard["keys"], shard["files"], strict=True):
        seen: set[str] = set()  # keys within the file: two documents of one id could not be told apart later
        for suffix, text, *reason in reader(Path(path), max_bytes, columns):
            if text is None or suffix in seen:
                counts[f"dropped:{reason[0] if text is None else _REPEATED}"] += 1
                continue
            seen.add(suffix)
            size = len(text.encode())
            counts.update({"documents": 1, "bytes": size})
            rows.append((key + suffix, text))
            held += size
            if held >= _BATCH_BYTES:
                yield _table(shard, rows)
                rows, held = [], 0
    yield _table(shard, rows)


def _table(shard: Row, rows: list[tuple[str, str]]) -> pa.Table:
    """Documents from (key, text) pairs."""
    columns: list[Any] = [
        [document_id(shard["source"], key) for key, _ in rows],
        [text for _, text in rows],
        [shard["source"]] * len(rows),
        [shard["license"]] * len(rows),
        [[("path", key)] for key, _ in rows],
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


_REPEATED = "repeated_id"
_REASONS = ("unreadable", "empty", "binary", "not_utf8", "oversized", "malformed", _REPEATED)


def _sha256(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError:
        return "unreadable"


step = Corpus()
