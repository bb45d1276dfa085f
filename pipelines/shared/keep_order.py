"""What the steps beside `dedup` share: a row for each document, and which of them comes before which.

The order is that of `dedup`: a source named earlier in `prefer`, then the better quality, where an earlier step gave
one, then the longer text, then content hash and id. It is of the documents, not of files or workers, so what is decided
by it depends on neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moray.pipelines.dedup.find import Documents
from moray.pipelines.dedup.graph import Indices
from moray.pipelines.dedup.nodes import documents_in
from moray.pipelines.shared.documents import read_shard, shard_paths, text_bytes, write_shard
from moray.pipelines.shared.shards import Row
from moray.platform.core.errors import nearest
from moray.platform.plan.step import StepContext


def shards_of(ctx: StepContext[Any]) -> list[Row]:
    """A description of each shard of the input `documents`. Says it if `prefer` names a source that they have not."""
    paths = shard_paths(ctx.inputs["documents"].folder)
    say_unknown_sources(ctx, paths)
    return [{"shard": i, "path": str(path), "size": path.stat().st_size} for i, path in enumerate(paths)]


def say_unknown_sources(ctx: StepContext[Any], paths: Sequence[Path]) -> None:
    """A preference for a source that is not there decides nothing, and is no error: another corpus may have it."""
    if not ctx.config.prefer:
        return
    sources = {source for path in paths for source in pc.unique(read_shard(path, ["source"])["source"]).to_pylist()}
    for name in ctx.config.prefer:
        if name not in sources:
            ctx.note(f"prefer: no document is of a source {name!r}: {nearest(name, sources)}", level="warning")


def size_of(shard: Row) -> float:
    """The work of a shard, in bytes of its file."""
    return float(shard["size"])


@dataclass(frozen=True)
class Order:
    """All documents of a corpus. table: a row of each, shard after shard; firsts: the row of each shard's first one;
    order: the row of each place in keep order."""

    table: pa.Table
    firsts: Indices
    documents: Documents
    order: Indices

    @staticmethod
    def of(tables: Sequence[pa.Table], prefer: Sequence[str], earlier: Indices | None = None) -> Order:
        """From the tables of the shards. earlier: [N], by which documents of one preference come first, least first."""
        table = pa.concat_tables(tables)
        documents = documents_in(table, prefer)
        if earlier is not None and len(earlier):
            ranks = documents.sources * (int(earlier.max()) + 1) + earlier
            documents = replace(documents, sources=ranks)
        documents, order = documents.in_keep_order()
        firsts = np.cumsum([0, *(len(one) for one in tables[:-1])], dtype=np.int64)
        return Order(table, firsts, documents, order)

    @property
    def places(self) -> Indices:
        """Of each row its place in keep order."""
        places = np.empty(len(self.order), np.int64)
        places[self.order] = np.arange(len(self.order))
        return places

    def ids(self, places: Indices) -> pa.Array:
        """Of the documents at these places."""
        return pa.array([name.decode() for name in self.documents.ids[places].tolist()], pa.string())


def read_parts(folder: Path, shards: Sequence[Row]) -> list[pa.Table]:
    """What the tasks of the shards left in `folder`, under the shards' own names."""
    return [read_shard(folder / Path(shard["path"]).name) for shard in shards]


def keep_shard(shard: Row, folder: str) -> Row:
    """Writes one shard without the removed documents."""
    path = Path(shard["path"])
    target = Path(folder) / path.name
    if not target.exists():
        removed = read_shard(Path(folder) / "removed.parquet", ["id"])["id"]
        table = read_shard(path)
        gone = pc.is_in(table["id"], value_set=removed.combine_chunks())
        kept = table.filter(pc.invert(gone))
        write_shard(target, kept)
    else:
        kept = read_shard(target, ["text"])
    return {"shard": shard["shard"], "kept": len(kept), "bytes": text_bytes(kept["text"])}
