"""corpus: converts files of text, code, rows and web pages, on this machine or in a bucket, to Documents.

Files are listed and sorted once, grouped into shards by size, and read by Ray Data tasks. Rejects are counted by reason
and written to files. A document's id depends on the source's name and the file's path within it, not on the location of
the source.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from moray.pipelines.corpus.corpus_shard import (
    bytes_in_progress,
    rejects_name,
    remove_progress_files,
    write_corpus_shard,
)
from moray.pipelines.corpus.listing import Listing
from moray.pipelines.corpus.source import Source
from moray.pipelines.corpus.source_file import content_digest
from moray.pipelines.shared.documents import read_shard
from moray.pipelines.shared.shards import Row, map_shards
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step, Upload
from moray.platform.store.paths import AnyPath


class CorpusConfig(StepConfig):
    sources: tuple[Source, ...] = Field(min_length=1)
    max_document_bytes: int = Field(1_000_000, gt=0, description="longer texts are rejected")
    shard_bytes: int = Field(4_000_000, gt=0, description="size of the groups of files that one task reads")


class Corpus(Step[CorpusConfig]):
    name: ClassVar[str] = "corpus"
    version: ClassVar[int] = 2  # 2: reads links to files, every intact record of a damaged archive, padded archives
    Config = CorpusConfig
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def check(self, config: CorpusConfig, inputs: Mapping[str, str]) -> None:
        names = Counter(source.name for source in config.sources)
        if repeated := [name for name, n in names.items() if n > 1]:
            raise RecipeError(f"sources: duplicate name {repeated[0]!r}", "give each source a unique name")
        for i, source in enumerate(config.sources):
            if source.is_on_hosts and not source.has_files():
                continue  # the driver's host checks them
            try:
                listing = source.listing()
            except InputError as error:
                raise RecipeError(f"sources.{i}: {error.message}", error.hint) from error
            if not listing.files:
                skipped = f"; skipped: {listing.summary(expected=True)}" if listing.skipped else ""
                problem = f"no file matches {list(source.include)} in {source.location()}{skipped}"
                raise RecipeError(
                    f"sources.{i}: source {source.name!r}: {problem}",
                    f"correct `include` or `{'url' if source.url else 'path'}`",
                )

    def external(self, config: CorpusConfig) -> list[ExternalFile]:
        return [
            ExternalFile(source.name, key, file.size, content_digest(file))
            for source in config.sources
            for key, file in source.files()
        ]

    def submitted(self, config: CorpusConfig, upload: Upload) -> dict[str, str]:
        """Uploads the listed files of each local source. Tasks read them in the store."""
        found = {}
        for number, source in enumerate(config.sources):
            if source.url is None and not source.submitted and not source.is_on_hosts:
                files = {key: Path(file.location) for key, file in source.files()}
                found[f"sources.{number}.submitted"] = upload(files)
        return found

    def run(self, ctx: StepContext[CorpusConfig]) -> None:
        listings = [(source, source.listing()) for source in ctx.config.sources]
        for source, listing in listings:
            if summary := listing.summary(expected=False):
                ctx.note(f"source {source.name!r}: skipped: {summary}", level="warning")
        shards = corpus_shards(ctx.config, [listing for _, listing in listings])
        write = partial(write_corpus_shard, folder=ctx.output, max_bytes=ctx.config.max_document_bytes)
        remove_progress_files(ctx.output)  # of a killed run
        rows = map_shards(
            ctx,
            "reading",
            shards,
            write,
            "bytes",
            lambda row: sum(row["sizes"]),
            partly=partial(bytes_in_progress, ctx.output),
        )
        remove_progress_files(ctx.output)
        dropped: Counter[str] = Counter()
        for row in rows:
            dropped.update({key.removeprefix("dropped:"): n for key, n in row.items() if key.startswith("dropped:")})
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()) if n)
        documents = sum(row["documents"] for row in rows)
        if not documents:
            rejected = f": rejected {reasons}" if reasons else ""
            raise InputError(f"the corpus has no usable documents{rejected}", _first_reject(ctx.output, shards))
        skipped = sum((listing.skipped for _, listing in listings), Counter[str]())
        ctx.counts |= {
            "in:files": sum(len(shard["files"]) for shard in shards),
            "out:documents": documents,
            "bytes": sum(row["bytes"] for row in rows),
            **{f"dropped:{reason}": n for reason, n in sorted(dropped.items()) if n},
            **{f"passed:{reason}": n for reason, n in sorted(skipped.items())},
        }
        ctx.outcome = f"{ctx.counts['bytes'] / 1e6:.1f} MB" + (f"; rejected {reasons}" if reasons else "")


def _first_reject(folder: AnyPath, shards: list[Row]) -> str:
    """The first reject with its reason, and the files that list the others."""
    for shard in shards:
        path = folder / rejects_name(shard["shard"])
        for row in read_shard(path).slice(0, 1).to_pylist():
            reason = f"{row['reason']}: {row['detail']}" if row["detail"] else row["reason"]
            return f"first: {row['source']}/{row['key']}: {reason}; all are in {path.parent}/rejected-*.parquet"
    return "every file is empty"


def corpus_shards(config: CorpusConfig, listings: Sequence[Listing] | None = None) -> list[Row]:
    """Groups each source's files, in order, into shards of about `shard_bytes`."""
    shards: list[Row] = []
    listings = [source.listing() for source in config.sources] if listings is None else listings
    for source, listing in zip(config.sources, listings, strict=True):
        size = config.shard_bytes  # makes every source begin a new shard
        for key, file in listing.files:
            if size >= config.shard_bytes:
                lists: Row = {name: [] for name in ("keys", "files", "sizes", "etags")}
                shards.append({"shard": len(shards), "root": file.root, **lists, **_description(source)})
                size = 0
            for name, value in (
                ("keys", key),
                ("files", os.fsencode(file.location)),
                ("sizes", file.size),
                ("etags", file.etag),
            ):
                shards[-1][name].append(value)
            size += file.size
    return shards


def _description(source: Source) -> Row:
    """The properties of a source for its tasks, as strings: a None may drop its column in Ray Data's Arrow blocks."""
    return {
        "source": source.name,
        "license": source.license,
        "reader": source.reader,
        "columns": json.dumps(asdict(source.columns())),
    }


step = Corpus()
