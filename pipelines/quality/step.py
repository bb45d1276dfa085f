"""The step `quality-model`: trains a quality classifier from positive and negative examples, for the step `filter`.

The examples are documents of positive and negative sources, or a file of labelled texts. The sample, the held-out split
and the model depend only on document ids and the seed, not on shards or workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pydantic import Field, model_validator

from moray.pipelines.quality.quality_model import Features, QualityModel
from moray.pipelines.shared.documents import read_shard, write_parquet
from moray.pipelines.shared.shards import Row, file_bytes, input_shards, map_shards, output_path, shard_path
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.config import StepConfig, operational, user_path
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file
from moray.platform.store.paths import AnyPath, local_file, remove_folder

_EXAMPLES = ".examples"
_SCHEMA = pa.schema([("id", pa.string()), ("order", pa.uint64()), ("good", pa.bool_()), ("text", pa.large_string())])


class QualityModelConfig(StepConfig):
    positive: tuple[str, ...] = Field((), description="sources of positive examples")
    negative: tuple[str, ...] = Field((), description="sources of negative examples")
    labels: Path | None = operational(None, description="instead: JSON lines file with `text` and `label` (1 or 0)")
    max_documents: int = Field(20_000, gt=1, description="maximum examples per class, sampled at random")
    heldout: float = Field(0.1, gt=0, lt=1, description="fraction of examples held out to measure AUC")
    words: int = Field(2, ge=1, le=5, description="maximum n-gram length, in words")
    buckets: int = Field(1 << 18, ge=1 << 10, le=1 << 26, description="hash buckets for n-grams: a power of two")
    characters: int = Field(10_000, gt=0, description="characters read per text")
    epochs: int = Field(10, gt=0)
    regularization: float = Field(1e-5, gt=0, description="L2 regularization strength")
    seed: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _one_kind_of_examples(self) -> QualityModelConfig:
        if bool(self.positive and self.negative) == (self.labels is not None) or bool(self.positive) != bool(
            self.negative
        ):
            raise ValueError("set either `positive` and `negative`, or `labels`")
        if both := set(self.positive) & set(self.negative):
            raise ValueError(f"sources in both `positive` and `negative`: {', '.join(sorted(both))}")
        if self.buckets & (self.buckets - 1):
            raise ValueError(f"`buckets` must be a power of two, not {self.buckets}")
        return self

    @property
    def features(self) -> Features:
        return Features(self.words, self.buckets, self.characters)


class QualityModelStep(Step[QualityModelConfig]):
    name: ClassVar[str] = "quality-model"
    version: ClassVar[int] = 3  # 2, 3: new word hash
    Config = QualityModelConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    optional: ClassVar[frozenset[str]] = frozenset({"documents"})
    produces: ClassVar[str] = "quality-model"
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: QualityModelConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def check(self, config: QualityModelConfig, inputs: Mapping[str, str]) -> None:
        if config.labels is None and "documents" not in inputs:
            raise RecipeError("quality-model has no examples", "add the input `documents`, or set labels")
        if config.labels is not None and "documents" in inputs:
            raise RecipeError("conflicting: both labels and the input `documents` are set", "remove one of them")
        if config.labels is not None and not user_path(config.labels).is_file():
            raise RecipeError(f"labels: {config.labels} does not exist", "correct the path in the recipe")

    def external(self, config: QualityModelConfig) -> list[ExternalFile]:
        if config.labels is None:
            return []
        path = user_path(config.labels)
        return [ExternalFile("labels", path.name, path.stat().st_size, hash_file(path))] if path.is_file() else []

    def run(self, ctx: StepContext[QualityModelConfig]) -> None:
        if ctx.config.labels is not None:
            examples = _sample([_labelled(user_path(ctx.config.labels), ctx.config.seed)], ctx.config)
        else:
            examples = self._of_sources(ctx)
        good = examples["good"].to_numpy()
        held = _held_out(examples["id"].to_pylist(), ctx.config)
        for kind, name in ((True, "positive"), (False, "negative")):
            train, heldout = (int(((good == kind) & (held == is_held)).sum()) for is_held in (False, True))
            if not train or not heldout:
                raise InputError(
                    f"too few {name} examples: {train} for training, {heldout} held out",
                    "use sources with more documents, or change heldout",
                )
            ctx.counts[name] = train + heldout
        ctx.progress("training", 0, 1, "models")
        model, auc = _train(examples["text"], good, held, ctx.config)
        ctx.progress("training", 1, 1, "models")
        counted = {name: int(ctx.counts[name]) for name in ("positive", "negative")}
        model.save(ctx.folder, auc=auc, heldout=int(held.sum()), **counted)
        remove_folder(ctx.output / _EXAMPLES)
        ctx.counts |= {"in:documents": len(good), "heldout": int(held.sum()), "auc": auc}
        ctx.outcome = f"AUC {auc:.4f} on {int(held.sum())} held-out documents"

    def _of_sources(self, ctx: StepContext[QualityModelConfig]) -> pa.Table:
        shards = input_shards(ctx.inputs["documents"].location)
        apply = partial(_examples_of_shard, folder=ctx.output / _EXAMPLES, config=ctx.config)
        map_shards(ctx, "sampling", shards, apply, "bytes", file_bytes)
        return _sample((read_shard(output_path(ctx.output / _EXAMPLES, shard)) for shard in shards), ctx.config)


def _train(texts: pa.ChunkedArray, good: Any, held: Any, config: QualityModelConfig) -> tuple[QualityModel, float]:
    """Trains the model on the examples that are not held out. Returns it, and its AUC on the held-out examples."""
    from sklearn.linear_model import SGDClassifier
    from sklearn.metrics import roc_auc_score

    matrix = config.features.matrix(texts)
    classifier = SGDClassifier(
        loss="log_loss",
        alpha=config.regularization,
        max_iter=config.epochs,
        tol=None,
        average=True,
        class_weight="balanced",
        random_state=config.seed,
    )
    classifier.fit(matrix[~held], good[~held])
    model = QualityModel(config.features, classifier.coef_[0].astype(np.float32), float(classifier.intercept_[0]))
    scores = model.scores(texts.filter(pa.array(held)))
    return model, float(roc_auc_score(good[held], scores))


def _id_hash(name: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed)


def _held_out(ids: list[str], config: QualityModelConfig) -> Any:
    """Whether each document is held out, bool [N]: by a hash of the id that is independent of the sampling."""
    limit = config.heldout * 2.0**64
    return np.array([_id_hash(f"heldout {name}", config.seed) < limit for name in ids])


def _sample(tables: Iterable[pa.Table], config: QualityModelConfig) -> pa.Table:
    """The `max_documents` of each class with the smallest hashes, sorted by hash; the same for any shards."""
    kept: dict[bool, pa.Table] = {kind: _SCHEMA.empty_table() for kind in (True, False)}
    for table in tables:
        for kind, before in kept.items():
            both = pa.concat_tables([before, table.filter(pc.equal(table["good"], kind))])
            kept[kind] = both.sort_by([("order", "ascending"), ("id", "ascending")]).slice(0, config.max_documents)
    joined = pa.concat_tables(kept.values())
    return joined.sort_by([("order", "ascending"), ("id", "ascending")])


def _examples_of_shard(shard: Row, folder: AnyPath, config: QualityModelConfig) -> Row:
    """Writes the examples of a shard that can be part of the sample. Runs in a Ray worker."""
    with local_file(shard_path(shard)) as local, pq.ParquetFile(local) as file:
        tables = (_examples(pa.Table.from_batches([batch]), config) for batch in file.iter_batches(512))
        write_parquet(output_path(folder, shard), _sample(tables, config))
    return {"shard": shard["shard"]}


def _examples(table: pa.Table, config: QualityModelConfig) -> pa.Table:
    sources = pa.array([*config.positive, *config.negative], pa.string())
    table = table.filter(pc.is_in(table["source"], value_set=sources))
    texts = pc.utf8_slice_codeunits(table["text"], 0, config.characters)
    order = [_id_hash(name, config.seed) for name in table["id"].to_pylist()]
    good = pc.is_in(table["source"], value_set=pa.array(config.positive, pa.string()))
    return pa.table([table["id"], pa.array(order, pa.uint64()), good, texts], schema=_SCHEMA)


def _labelled(path: Path, seed: int) -> pa.Table:
    """The examples of a file. Raises InputError that names the first invalid line."""
    rows = list(_lines(path))
    ids = [str(number) for number, _, _ in rows]
    order = pa.array([_id_hash(name, seed) for name in ids], pa.uint64())
    return pa.table([ids, order, [good for _, good, _ in rows], [text for _, _, text in rows]], schema=_SCHEMA)


def _lines(path: Path) -> Iterator[tuple[int, bool, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                text, label = row["text"], row["label"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}, line {number}: not a JSON object with `text` and `label`: {error!r}"
                ) from error
            if not isinstance(text, str) or label not in (0, 1):
                raise InputError(f"{path}, line {number}: `text` must be a string and `label` 1 or 0, not {label!r}")
            yield number, bool(label), text


step = QualityModelStep()
