"""Shared by the dedup steps: input shards with a check of `prefer`, and shards without the removed documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moray.pipelines.shared.documents import read_shard, text_bytes, write_shard
from moray.pipelines.shared.shards import Row, input_shards, output_path, shard_path, shard_stem
from moray.pipelines.shared.task_records import recorded
from moray.platform.core.errors import nearest
from moray.platform.plan.context import StepContext
from moray.platform.store.paths import AnyPath, in_threads


def preferring_shards(ctx: StepContext[Any]) -> list[Row]:
    """Returns `input_shards`; warns if `prefer` names a source that no document has."""
    shards = input_shards(ctx.inputs["documents"].location)
    warn_of_unknown_sources(ctx, [shard_path(shard) for shard in shards])
    return shards


def warn_of_unknown_sources(ctx: StepContext[Any], paths: Sequence[AnyPath]) -> None:
    """Warns of each source in `prefer` that no document has. This is no error, because another corpus may have it."""
    if not ctx.config.prefer:
        return
    found = in_threads(lambda path: pc.unique(read_shard(path, ["source"])["source"]).to_pylist(), paths)
    sources = {source for some in found for source in some}
    for name in ctx.config.prefer:
        if name not in sources:
            ctx.note(f"prefer: no document has the source {name!r}: {nearest(name, sources)}", level="warning")


def read_outputs(folder: AnyPath, shards: Sequence[Row]) -> list[pa.Table]:
    """Reads the tables that the tasks of the shards wrote to `folder`, under the names of the shards."""
    return in_threads(lambda shard: read_shard(output_path(folder, shard)), shards)


def keep_shard(shard: Row, folder: AnyPath) -> Row:
    """Writes one shard without the removed documents. Returns the number of kept documents and their bytes."""
    return recorded(folder, shard_stem(shard), lambda: _keep(shard, folder))


def _keep(shard: Row, folder: AnyPath) -> Row:
    removed = read_shard(folder / "removed.parquet", ["id"])["id"]
    table = read_shard(shard_path(shard))
    is_removed = pc.is_in(table["id"], value_set=removed.combine_chunks())
    kept = table.filter(pc.invert(is_removed))
    write_shard(output_path(folder, shard), kept)
    return {"shard": shard["shard"], "kept": len(kept), "bytes": text_bytes(kept["text"])}
