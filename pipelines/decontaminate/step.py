"""decontaminate: drops documents that hold a piece of an eval, and says which piece of which item.

Two passes over shards, as Ray Data tasks: the first looks up every n-gram of a document among those of the evals and
leaves what it found, its text compared, never only its hash; then all findings together decide, and the second pass
writes what stays. Shards of which nothing goes are copied as they are. A rerun after a kill goes on with the shards
that have no record yet.
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
from moray.pipelines.shared.documents import read_shard, write_parquet, write_shard
from moray.pipelines.shared.shards import Row, file_bytes, input_shards, map_shards, output_path
from moray.pipelines.shared.task_records import forget_records, recorded
from moray.platform.core.atomic import whole_file, write_json
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file

_SIZES = {"words": 13, "characters": 50}
_SHORTEST = {"words": 8, "characters": 30}
_EVALS, _MATCHES = ".evals", ".matches"


class DecontaminateConfig(StepConfig):
    evals: tuple[EvalSet, ...] = Field(min_length=1)
    unit: Literal["words", "characters"] = "words"
    size: int | None = Field(None, gt=0, description="units of an n-gram; default: 13 words, or 50 characters")
    shortest: int | None = Field(
        None,
        gt=0,
        description="an item shorter than an n-gram is looked for as a whole from here on; default: 8, or 30",
    )
    telling: int = Field(
        3, ge=0, description="distinct words of two letters (ideographs, letters) that an n-gram must have"
    )
    max_overlap: float = Field(
        0.0, ge=0, lt=1, description="share of an item's n-grams that a document may have; 0: with any, it goes"
    )
    ignore_common: int | None = Field(
        None, gt=0, description="an n-gram that more documents have is a phrase, not a leak, and counts nowhere"
    )
    action: Literal["drop", "report"] = "drop"

    @model_validator(mode="after")
    def _shorter(self) -> DecontaminateConfig:
        if self.grams.least > self.grams.size:
            raise ValueError(f"`shortest` ({self.grams.least}) is more than `size` ({self.grams.size})")
        return self

    @property
    def grams(self) -> Grams:
        size = self.size or _SIZES[self.unit]
        shortest = self.shortest or min(_SHORTEST[self.unit], size)
        return Grams(size, self.unit == "characters", shortest, self.telling)


class Decontaminate(Step[DecontaminateConfig]):
    name: ClassVar[str] = "decontaminate"
    version: ClassVar[int] = 3  # 2: items whose ids repeat are several. 3: every form of Unicode
    Config = DecontaminateConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def check(self, config: DecontaminateConfig, inputs: Mapping[str, str]) -> None:
        names = Counter(one.name for one in config.evals)
        if repeated := [name for name, n in names.items() if n > 1]:
            raise RecipeError(f"evals: the name {repeated[0]!r} is used twice", "give every eval its own name")
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
        index.save(ctx.folder / _EVALS)
        shards = input_shards(ctx.inputs["documents"].folder)
        look = partial(_search_shard, folder=str(ctx.folder), characters=index.characters)
        rows = map_shards(ctx, "searching", shards, look, "bytes", file_bytes)
        matches = pa.concat_tables([read_shard(output_path(ctx.folder / _MATCHES, shard)) for shard in shards])
        verdict = find_contamination(matches, index, ctx.config.max_overlap, ctx.config.ignore_common)
        total = sum(row["documents"] for row in rows)
        dropping = ctx.config.action == "drop"
        if dropping and len(verdict.removed) == total:
            raise InputError("decontaminate drops every document", "raise `max_overlap`, or take other documents")
        write_parquet(ctx.folder / "contamination.parquet", verdict.hits)
        write_parquet(ctx.folder / _MATCHES / "removed.parquet", verdict.removed.slice(0, None if dropping else 0))
        keep = partial(_keep_shard, folder=str(ctx.folder))
        kept = map_shards(ctx, "writing", shards, keep, "bytes", file_bytes)
        for folder in (_EVALS, _MATCHES):
            shutil.rmtree(ctx.folder / folder)
        forget_records(ctx.folder)
        ctx.counts |= {
            "in:documents": total,
            "out:documents": sum(row["kept"] for row in kept),
            "bytes": sum(row["bytes"] for row in kept),
        }
        self._say(ctx, index, verdict)

    def _say(self, ctx: StepContext[DecontaminateConfig], index: EvalIndex, verdict: ContaminationResult) -> None:
        evals = per_eval(index, verdict.hits)
        report: dict[str, Any] = {
            "unit": ctx.config.unit,
            "size": ctx.config.grams.size,
            "documents": int(ctx.counts["in:documents"]),
            "contaminated": len(verdict.removed),
            "action": ctx.config.action,
            "evals": evals,
            "ignored": [{"text": text, "documents": n} for text, n in verdict.ignored],
        }
        write_json(ctx.folder / "report.json", report)
        looked_for = sum(one["items"] - one["items_not_looked_for"] for one in evals)
        found = sum(one["items_found"] for one in evals)
        ctx.counts |= {
            "items": sum(one["items"] for one in evals),
            "items:found": found,
            "items:not_looked_for": sum(one["items_not_looked_for"] for one in evals),
            ("dropped:contaminated" if ctx.config.action == "drop" else "contaminated"): len(verdict.removed),
        }
        if verdict.ignored:
            ctx.note(
                f"{len(verdict.ignored)} n-grams are ignored: each is in more than {ctx.config.ignore_common} documents"
            )
        does = "dropped" if ctx.config.action == "drop" else "found"
        ctx.outcome = f"{does} {len(verdict.removed)} documents with {found} of {looked_for} eval items"


def _index(config: DecontaminateConfig) -> EvalIndex:
    """Raises InputError if an eval has nothing that could be looked for: nothing would be found, without a word."""
    pieces = [piece for one in config.evals for piece in read_pieces(one)]
    for one in config.evals:
        if not any(piece.eval == one.name for piece in pieces):
            raise InputError(f"eval {one.name!r} has no item with a text", "correct `path`, `include` or `fields`")
    index = build_index(pieces, config.grams)
    looked_for = {index.items[i][0] for i, whole in enumerate(index.grams_of_items()) if whole}
    for one in config.evals:
        if one.name not in looked_for:
            raise InputError(
                f"eval {one.name!r}: no item has a text of {config.grams.least} {config.unit}",
                "lower `shortest`, or correct `fields`",
            )
    return index


def _search_shard(shard: Row, folder: str, characters: bool) -> Row:
    """Writes what one shard has of the evals. Runs in a Ray worker."""
    path = Path(shard["path"])
    return recorded(folder, f"searched-{path.stem}", lambda: _search(shard, path, Path(folder), characters))


def _search(shard: Row, path: Path, folder: Path, characters: bool) -> Row:
    table = read_shard(path, ["id", "source", "text"])
    found = load_index(folder / _EVALS, characters).find(table["text"])
    at = pa.array([match.row for match in found], pa.int64())
    columns = [
        table["id"].take(at),
        table["source"].take(at),
        pa.array([match.gram for match in found], pa.int64()),
        pa.array([match.place for match in found], pa.int64()),
        pa.array([match.excerpt for match in found], pa.large_string()),
    ]
    write_parquet(folder / _MATCHES / path.name, pa.table(columns, schema=MATCHES))
    return {"shard": shard["shard"], "documents": table.num_rows}


def _keep_shard(shard: Row, folder: str) -> Row:
    """Writes one shard without the removed documents, and what went. Runs in a Ray worker."""
    path = Path(shard["path"])
    return recorded(folder, f"written-{path.stem}", lambda: _keep(shard, path, Path(folder)))


def _keep(shard: Row, path: Path, folder: Path) -> Row:
    target = folder / path.name
    removed = read_shard(folder / _MATCHES / "removed.parquet")
    own = removed.filter(pc.is_in(removed["id"], value_set=read_shard(path, ["id"])["id"].combine_chunks()))
    write_parquet(target.with_name(path.name.replace("documents-", "removed-")), own)
    _copy(path, target, own["id"])
    texts = read_shard(target, ["text"])["text"]
    return {"shard": shard["shard"], "kept": len(texts), "bytes": pc.sum(pc.binary_length(texts)).as_py() or 0}


def _copy(path: Path, target: Path, without: pa.ChunkedArray) -> None:
    if len(without):
        table = read_shard(path)
        write_shard(target, table.filter(pc.invert(pc.is_in(table["id"], value_set=without.combine_chunks()))))
        return
    with whole_file(target) as temporary:
        shutil.copyfile(path, temporary)


step = Decontaminate()
