"""The step `decontaminate`: drops documents that contain n-grams of an eval, and reports the items and passages.

Two passes over the shards run as Ray Data tasks. The first looks up every n-gram of a document among those of the evals
and writes the verified matches. All matches together determine the contaminated documents. The second pass writes the
kept documents; shards without contaminated documents are copied. A run that resumes after a kill processes only the
shards without a record.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from moray.pipelines.decontaminate.contamination import MATCHES, ContaminationResult, find_contamination, per_eval
from moray.pipelines.decontaminate.eval_index import EvalIndex, Grams, build_index, load_index
from moray.pipelines.decontaminate.evals import EvalSet, read_pieces
from moray.pipelines.shared.documents import read_shard, text_bytes, write_parquet, write_shard
from moray.pipelines.shared.shards import Row, file_bytes, input_shards, map_shards, output_path, shard_path, shard_stem
from moray.pipelines.shared.task_records import forget_records, recorded
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file
from moray.platform.store.paths import AnyPath, in_threads, local_file, new_file, remove_folder

_SIZES = {"words": 13, "characters": 50}
_SHORTEST = {"words": 8, "characters": 30}
_EVALS, _MATCHES = ".evals", ".matches"


class DecontaminateConfig(StepConfig):
    evals: tuple[EvalSet, ...] = Field(min_length=1)
    unit: Literal["words", "characters"] = "words"
    size: int | None = Field(None, gt=0, description="n-gram length in units; default: 13 words, or 50 characters")
    shortest: int | None = Field(
        None,
        gt=0,
        description="minimum length of items that are shorter than an n-gram; default: 8 words, or 30 characters",
    )
    telling: int = Field(
        3,
        ge=0,
        description="minimum distinct informative units per n-gram: words of two letters or more, ideographs; letters",
    )
    max_overlap: float = Field(
        0.0, ge=0, lt=1, description="share of an item's n-grams that a kept document may contain; 0: none"
    )
    ignore_common: int | None = Field(
        None, gt=0, description="ignore n-grams that more documents than this contain, as common phrases"
    )
    action: Literal["drop", "report"] = "drop"

    @model_validator(mode="after")
    def _shorter(self) -> DecontaminateConfig:
        if self.grams.shortest > self.grams.size:
            raise ValueError(f"`shortest` ({self.grams.shortest}) exceeds `size` ({self.grams.size})")
        return self

    @property
    def grams(self) -> Grams:
        size = self.size or _SIZES[self.unit]
        shortest = self.shortest or min(_SHORTEST[self.unit], size)
        return Grams(size, self.unit == "characters", shortest, self.telling)


class Decontaminate(Step[DecontaminateConfig]):
    name: ClassVar[str] = "decontaminate"
    version: ClassVar[int] = 3  # 2: items with repeated ids are distinct. 3: Unicode normalization
    Config = DecontaminateConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: DecontaminateConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def check(self, config: DecontaminateConfig, inputs: Mapping[str, str]) -> None:
        names = Counter(one.name for one in config.evals)
        if repeated := [name for name, n in names.items() if n > 1]:
            raise RecipeError(f"evals: the name {repeated[0]!r} is used twice", "give each eval a unique name")
        for i, one in enumerate(config.evals):
            try:
                one.check()
            except InputError as error:
                raise RecipeError(f"evals.{i}: {error.message}", error.hint) from error

    def external(self, config: DecontaminateConfig) -> list[ExternalFile]:
        return [
            ExternalFile(one.name, key, path.stat().st_size, hash_file(path))
            for one in config.evals
            for key, path in one.files()
        ]

    def run(self, ctx: StepContext[DecontaminateConfig]) -> None:
        index = _index(ctx.config)
        index.save(ctx.output / _EVALS)
        shards = input_shards(ctx.inputs["documents"].location)
        search = partial(_search_shard, folder=ctx.output, characters=index.characters)
        rows = map_shards(ctx, "searching", shards, search, "bytes", file_bytes)
        paths = [output_path(ctx.output / _MATCHES, shard) for shard in shards]
        matches = pa.concat_tables(in_threads(read_shard, paths))
        found = find_contamination(matches, index, ctx.config.max_overlap, ctx.config.ignore_common)
        total = sum(row["documents"] for row in rows)
        dropping = ctx.config.action == "drop"
        if dropping and len(found.removed) == total:
            raise InputError("decontaminate drops every document", "raise `max_overlap`, or use other documents")
        write_parquet(ctx.folder / "contamination.parquet", found.hits)
        write_parquet(ctx.output / _MATCHES / "removed.parquet", found.removed.slice(0, None if dropping else 0))
        keep = partial(_keep_shard, folder=ctx.output)
        kept = map_shards(ctx, "writing", shards, keep, "bytes", file_bytes)
        for folder in (_EVALS, _MATCHES):
            remove_folder(ctx.output / folder)
        forget_records(ctx.output)
        ctx.counts |= {
            "in:documents": total,
            "out:documents": sum(row["kept"] for row in kept),
            "bytes": sum(row["bytes"] for row in kept),
        }
        self._report(ctx, index, found)

    def _report(self, ctx: StepContext[DecontaminateConfig], index: EvalIndex, result: ContaminationResult) -> None:
        evals = per_eval(index, result.hits)
        report: dict[str, Any] = {
            "unit": ctx.config.unit,
            "size": ctx.config.grams.size,
            "documents": int(ctx.counts["in:documents"]),
            "contaminated": len(result.removed),
            "action": ctx.config.action,
            "evals": evals,
            "ignored": [{"text": text, "documents": n} for text, n in result.ignored],
        }
        write_json(ctx.folder / "report.json", report)
        searched = sum(one["items"] - one["items_not_looked_for"] for one in evals)
        found = sum(one["items_found"] for one in evals)
        ctx.counts |= {
            "items": sum(one["items"] for one in evals),
            "items:found": found,
            "items:not_looked_for": sum(one["items_not_looked_for"] for one in evals),
            ("dropped:contaminated" if ctx.config.action == "drop" else "contaminated"): len(result.removed),
        }
        if result.ignored:
            ctx.note(
                f"{len(result.ignored)} n-grams are ignored: each is in more than {ctx.config.ignore_common} documents"
            )
        verb = "dropped" if ctx.config.action == "drop" else "found"
        ctx.outcome = f"{verb} {len(result.removed)} documents with {found} of {searched} eval items"


def _index(config: DecontaminateConfig) -> EvalIndex:
    """The index of all evals. Raises InputError for an eval without a searchable item, which would silently pass."""
    pieces = [piece for one in config.evals for piece in read_pieces(one)]
    for one in config.evals:
        if not any(piece.eval == one.name for piece in pieces):
            raise InputError(f"eval {one.name!r} has no item with a text", "correct `path`, `include` or `fields`")
    index = build_index(pieces, config.grams)
    searchable = {index.items[i][0] for i, total in enumerate(index.grams_of_items()) if total}
    for one in config.evals:
        if one.name not in searchable:
            raise InputError(
                f"eval {one.name!r}: no item has a text of {config.grams.shortest} {config.unit}",
                "lower `shortest`, or correct `fields`",
            )
    return index


def _search_shard(shard: Row, folder: AnyPath, characters: bool) -> Row:
    """Writes the matches of one shard. Runs in a Ray worker."""
    return recorded(folder, f"searched-{shard_stem(shard)}", lambda: _search(shard, folder, characters))


def _search(shard: Row, folder: AnyPath, characters: bool) -> Row:
    table = read_shard(shard_path(shard), ["id", "source", "text"])
    found = load_index(folder / _EVALS, characters).find(table["text"])
    at = pa.array([match.row for match in found], pa.int64())
    columns = [
        table["id"].take(at),
        table["source"].take(at),
        pa.array([match.gram for match in found], pa.int64()),
        pa.array([match.place for match in found], pa.int64()),
        pa.array([match.excerpt for match in found], pa.large_string()),
    ]
    write_parquet(output_path(folder / _MATCHES, shard), pa.table(columns, schema=MATCHES))
    return {"shard": shard["shard"], "documents": table.num_rows}


def _keep_shard(shard: Row, folder: AnyPath) -> Row:
    """Writes one shard without the removed documents, and the rows of these. Runs in a Ray worker."""
    return recorded(folder, f"written-{shard_stem(shard)}", lambda: _keep(shard, folder))


def _keep(shard: Row, folder: AnyPath) -> Row:
    target = output_path(folder, shard)
    removed = read_shard(folder / _MATCHES / "removed.parquet")
    with local_file(shard_path(shard)) as path:
        ids = read_shard(path, ["id"])["id"].combine_chunks()
        own = removed.filter(pc.is_in(removed["id"], value_set=ids))
        write_parquet(target.with_name(target.name.replace("documents-", "removed-")), own)
        texts = _copy(path, target, own["id"])
    return {"shard": shard["shard"], "kept": len(texts), "bytes": text_bytes(texts)}


def _copy(path: Path, target: AnyPath, without: pa.ChunkedArray) -> pa.ChunkedArray:
    """Writes a shard without some documents, given by id. Returns the texts that are left."""
    if len(without):
        table = read_shard(path)
        table = table.filter(pc.invert(pc.is_in(table["id"], value_set=without.combine_chunks())))
        write_shard(target, table)
        return table["text"]
    with new_file(target) as temporary:
        shutil.copyfile(path, temporary)
    return read_shard(path, ["text"])["text"]


step = Decontaminate()
