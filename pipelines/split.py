"""split: holds out documents for evaluation by a hash of their id.

A document is always on the same side of the split, whatever else the corpus holds. Writes two Documents folders,
`train/` and `heldout/`.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pyarrow as pa
import xxhash
from pydantic import Field

from moray.pipelines.shared.documents import read_shard, write_shard
from moray.pipelines.shared.shards import Row, file_bytes, input_shards, map_shards, output_path, shard_path
from moray.platform.core.errors import InputError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.paths import AnyPath

PARTS = ("train", "heldout")


class SplitConfig(StepConfig):
    heldout: float = Field(0.01, gt=0, lt=1, description="fraction of documents held out")
    salt: str = Field("", description="a different salt gives a different split")


def is_heldout(document_id: str, config: SplitConfig) -> bool:
    return xxhash.xxh3_64_intdigest((config.salt + document_id).encode()) < config.heldout * 2**64


class Split(Step[SplitConfig]):
    name: ClassVar[str] = "split"
    version: ClassVar[int] = 1
    Config = SplitConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "split-documents"
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: SplitConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def run(self, ctx: StepContext[SplitConfig]) -> None:
        shards = input_shards(ctx.inputs["documents"].location)
        apply = partial(_split_shard, folder=ctx.output, config=ctx.config)
        rows = map_shards(ctx, "splitting", shards, apply, "bytes", file_bytes)
        counts = {part: sum(row[part] for row in rows) for part in PARTS}
        if not all(counts.values()):
            raise InputError(f"one side of the split is empty: {counts}", "change `heldout` or use more documents")
        ctx.counts |= {"in:documents": sum(counts.values()), "out:documents": counts["train"], **counts}
        ctx.outcome = f"{counts['heldout']:,} held out"


def _split_shard(shard: Row, folder: AnyPath, config: SplitConfig) -> Row:
    """Splits one shard. Runs in a Ray worker."""
    table = read_shard(shard_path(shard))
    heldout = [is_heldout(i.as_py(), config) for i in table["id"]]
    sides = {"train": table.filter(pa.array([not h for h in heldout])), "heldout": table.filter(pa.array(heldout))}
    for part, side in sides.items():
        write_shard(output_path(folder / part, shard), side)
    return {"shard": shard["shard"], **{part: side.num_rows for part, side in sides.items()}}


step = Split()
