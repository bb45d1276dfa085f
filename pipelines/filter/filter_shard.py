"""One task of the step `filter`: it filters a shard of documents in batches, from file to file.

The rules, the language filter and the quality filter are applied in this order until one removes the document. PII in
kept documents is redacted last. Language and quality are written as columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moray.pipelines.filter.config import FilterConfig
from moray.pipelines.filter.redact import redact
from moray.pipelines.filter.rules import apply_rules
from moray.pipelines.quality.quality_model import QualityModel, load_quality_model
from moray.pipelines.shared.documents import write_batches, write_parquet
from moray.pipelines.shared.shards import Row, output_path, shard_path, shard_stem
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.text.language import CHARACTERS, identify
from moray.platform.store.paths import AnyPath, local_file

_BATCH = 512  # documents; starting a kernel takes microseconds
REMOVED = pa.schema(
    [("id", pa.string()), ("reason", pa.string()), ("value", pa.float64()), ("threshold", pa.float64())]
)
_LANGUAGE = (pa.field("language", pa.string()), pa.field("language_score", pa.float32()))

_QUALITY = (pa.field("quality", pa.float32()), pa.field("quality_band", pa.string()))


def filter_shard(shard: Row, folder: AnyPath, config: FilterConfig, model: AnyPath | None) -> Row:
    """Writes the kept documents, and the removed ones with their reasons. Returns counts. Runs in a Ray worker.

    model: the folder of a quality model, if any.
    """
    target = output_path(folder, shard)
    apply = lambda: {"shard": shard["shard"], **_filter(shard_path(shard), target, config, model)}  # noqa: E731
    return recorded(folder, shard_stem(shard), apply)


def _filter(path: AnyPath, target: AnyPath, config: FilterConfig, model: AnyPath | None) -> Counter[str]:
    shard_filter = _ShardFilter(config, model)
    with local_file(path) as local, pq.ParquetFile(local) as file:
        schema = shard_filter.schema(file.schema_arrow)
        tables = (pa.Table.from_batches([batch]) for batch in file.iter_batches(_BATCH))
        write_batches(target, schema, shard_filter.kept(schema, tables))
    write_parquet(target.with_name(target.name.replace("documents-", "removed-")), shard_filter.removed())
    return shard_filter.counts


class _ShardFilter:
    """Filters the tables of a shard, and collects the removed documents and the counts."""

    def __init__(self, config: FilterConfig, model: AnyPath | None) -> None:
        self.config, self._model = config, load_quality_model(model) if model else None
        names = ["documents", "bytes", "kept", "kept_bytes", "edited"]
        names += [f"dropped:{reason}" for reason in config.reasons()] + [f"masked:{kind}" for kind in config.mask]
        self.counts: Counter[str] = Counter(dict.fromkeys(names, 0))  # every shard has the same keys
        self._removed: list[pa.Table] = []

    def schema(self, before: pa.Schema) -> pa.Schema:
        """The schema of the kept documents: the input's columns, and those of language and quality."""
        added = (_LANGUAGE if self.config.identifies else ()) + (_QUALITY if self._model else ())
        for field in added:
            at = before.get_field_index(field.name)
            before = before.append(field) if at < 0 else before.set(at, field)
        return before

    def kept(self, schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yields the kept documents of each table."""
        for table in tables:
            self.counts["documents"] += table.num_rows
            self.counts["bytes"] += _bytes(table["text"])
            kept = self._by_rules(table)
            if self.config.identifies:
                kept = self._by_language(kept)
            if self._model:
                kept = self._by_quality(kept, self._model)
            if self.config.mask:
                kept = self._redacted(kept)
            self.counts["kept"] += kept.num_rows
            self.counts["kept_bytes"] += _bytes(kept["text"])
            yield kept.select(schema.names).cast(schema)

    def removed(self) -> pa.Table:
        """The documents removed so far, see REMOVED."""
        return pa.concat_tables([REMOVED.empty_table(), *self._removed])

    def _by_rules(self, table: pa.Table) -> pa.Table:
        filtered = apply_rules(table["text"], self.config)
        kept = self._remove(table, filtered.reasons, filtered.values, filtered.limits)
        if "c4" not in self.config.rules:
            return kept
        texts = filtered.texts.filter(pa.array([reason is None for reason in filtered.reasons]))
        self.counts["edited"] += _different(kept["text"], texts)
        return with_column(kept, kept.schema.field("text"), texts)

    def _by_language(self, table: pa.Table) -> pa.Table:
        languages, found = identify(pc.utf8_slice_codeunits(table["text"], 0, CHARACTERS).to_pylist())
        scores, minimum, allowed = np.array(found), self.config.min_language_score, set(self.config.languages)
        table = with_column(table, _LANGUAGE[0], pa.array(languages, pa.string()))
        table = with_column(table, _LANGUAGE[1], pa.array(scores, pa.float32()))
        if not allowed:
            return table
        other = [name not in allowed or score < minimum for name, score in zip(languages, found, strict=True)]
        return self._remove(table, ["language" if is_other else None for is_other in other], scores, minimum)

    def _by_quality(self, table: pa.Table, model: QualityModel) -> pa.Table:
        scores, minimum = model.scores(table["text"]).astype(np.float32), self.config.min_quality
        edges = [0.0, *self.config.quality_bands, 1.0]
        names = np.array([f"{low:g}-{high:g}" for low, high in pairwise(edges)])
        bands = names[np.searchsorted(np.array(edges[1:-1], np.float32), scores, side="right")]
        table = with_column(table, _QUALITY[0], pa.array(scores, pa.float32()))
        table = with_column(table, _QUALITY[1], pa.array(bands, pa.string()))
        if minimum is None:
            return table
        return self._remove(table, ["quality" if score < minimum else None for score in scores], scores, minimum)

    def _redacted(self, table: pa.Table) -> pa.Table:
        texts = []
        for text in table["text"].to_pylist():
            redacted, counts = redact(text, self.config.mask, self.config.phone_regions)
            self.counts.update({f"masked:{kind}": n for kind, n in counts.items()})
            texts.append(redacted)
        return with_column(table, table.schema.field("text"), pa.array(texts, pa.large_string()))

    def _remove(self, table: pa.Table, reasons: list[str | None], values: Any, limits: Any) -> pa.Table:
        """Returns the documents without a reason and records the others. values, limits: one number, or one each."""
        self.counts.update(f"dropped:{reason}" for reason in reasons if reason)
        is_kept = pa.array([reason is None for reason in reasons], pa.bool_())
        removed = np.flatnonzero([reason is not None for reason in reasons])
        columns = [table["id"].take(pa.array(removed)), [reason for reason in reasons if reason]]
        columns += [np.broadcast_to(numbers, len(reasons))[removed].astype(np.float64) for numbers in (values, limits)]
        self._removed.append(pa.table(columns, schema=REMOVED))
        return table.filter(is_kept)


def with_column(table: pa.Table, field: pa.Field, column: pa.Array) -> pa.Table:
    """The table with this column added, or replacing the column of the same name."""
    at = table.schema.get_field_index(field.name)
    return table.append_column(field, column) if at < 0 else table.set_column(at, field, column)


def _bytes(texts: pa.ChunkedArray) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.binary_length(texts)).as_py() or 0)


def _different(before: pa.ChunkedArray, after: pa.Array) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.not_equal(before, after)).as_py() or 0)
