"""Measurement of one shard of a stage: a row per document (language, domain, quality band, bytes, tokens), and sums.

A document is read once, in the stage where it first appears. A later stage copies its row, by id, from the shard of the
same name in the previous stage, and updates its bytes; if a step changed the text, tokens are scaled in proportion.
Documents without such a row are read, so a step that distributes documents to other shards costs time, not accuracy.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moray.pipelines.coverage.domains import domain_of
from moray.pipelines.shared.documents import read_shard, write_parquet
from moray.pipelines.shared.shards import Row, output_path, shard_path
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.text.language import identify
from moray.pipelines.tokenizer.train import load_tokenizer
from moray.platform.store.paths import AnyPath, local_file

BYTES_PER_TOKEN = 4
UNKNOWN = "unknown"
_COLUMNS = ("source", "language", "domain", "quality")
_BATCH = 256


def measure_shard(shard: Row, folder: AnyPath, before: AnyPath | None, tokenizer: AnyPath | None) -> Row:
    """Writes the rows of one shard to `folder`. Runs in a Ray worker.

    before: the folder with the rows of the previous stage, if any. tokenizer: its folder, if any. Returns, as JSON,
    `cells`: [source, language, domain, quality, documents, bytes, tokens], and `dropped`: [reason, documents, tokens]
    of the documents of the previous stage's shard that this stage removed.
    """
    path = shard_path(shard)

    def measure() -> Row:
        known = None if before is None else output_path(before, shard)
        old = read_shard(known) if known and known.exists() else None
        rows = _rows(path, old, tokenizer)
        write_parquet(output_path(folder, shard), rows)
        dropped = [] if old is None else _dropped(old, path)
        return {"shard": shard["shard"], "cells": json.dumps(_cells(rows)), "dropped": json.dumps(dropped)}

    return recorded(folder, path.stem, measure)


def _rows(path: AnyPath, old: pa.Table | None, tokenizer: AnyPath | None) -> pa.Table:
    with local_file(path) as local:
        names = set(pq.read_schema(local).names)
        table = read_shard(local, ["id", "text", "source", *({"language", "quality_band"} & names)])
    size = pc.cast(pc.binary_length(table["text"]), pa.int64()).to_numpy()
    places = np.full(table.num_rows, -1)
    if old is not None and table.num_rows:
        places = pc.index_in(table["id"], value_set=old["id"].combine_chunks()).fill_null(-1).to_numpy()
    new = np.flatnonzero(places < 0)
    languages = table["language"].to_pylist() if "language" in names else None
    new_languages = languages and [languages[i] for i in new]
    columns = _read(table["text"].take(pa.array(new)).to_pylist(), new_languages, tokenizer)
    merged: dict[str, list[Any]] = {}
    for name, values in columns.items():
        fresh, kept = iter(values), [] if old is None else old[name].to_pylist()
        merged[name] = [next(fresh) if place < 0 else kept[place] for place in places]
    if old is not None:
        old_size = old["bytes"].to_pylist()
        changed = [i for i, place in enumerate(places) if place >= 0 and size[i] != old_size[place]]
        for i in changed:
            share = size[i] / max(1, old_size[places[i]])
            merged["tokens"][i] = round(4 * merged["tokens"][i] * share) / 4  # sums of quarters are exact in any order
    if languages is not None:
        merged["language"] = [name or UNKNOWN for name in languages]
    bands = table["quality_band"].to_pylist() if "quality_band" in names else [""] * table.num_rows
    return pa.table(
        {
            "id": table["id"],
            "source": table["source"],
            "language": pa.array(merged["language"], pa.string()),
            "domain": pa.array(merged["domain"], pa.string()),
            "quality": pa.array([str(band or "") for band in bands], pa.string()),
            "bytes": pa.array(size, pa.int64()),
            "tokens": pa.array(merged["tokens"], pa.float64()),
        }
    )


def _read(texts: list[str], languages: list[str] | None, tokenizer: AnyPath | None) -> dict[str, list[Any]]:
    """The language, domain and tokens of each text. languages: from an earlier step, or None to identify them."""
    codes = [code or "" for code in languages] if languages is not None else identify(texts)[0]
    return {
        "language": [code or UNKNOWN for code in codes],
        "domain": [domain_of(text, code) for text, code in zip(texts, codes, strict=True)],
        "tokens": _tokens(texts, tokenizer),
    }


def _tokens(texts: list[str], tokenizer: AnyPath | None) -> list[float]:
    """The tokens of each text, by the tokenizer in a folder; without one, estimated as four bytes per token."""
    if tokenizer is None:
        return [len(text.encode()) / BYTES_PER_TOKEN for text in texts]
    model = load_tokenizer(tokenizer)
    model.encode_special_tokens = True  # text that spells a special token is encoded as text
    counts: list[float] = []
    for begin in range(0, len(texts), _BATCH):
        encoded = model.encode_batch_fast(texts[begin : begin + _BATCH], add_special_tokens=False)
        counts += [float(len(one.ids)) for one in encoded]
    return counts


def _cells(rows: pa.Table) -> list[list[Any]]:
    sums = rows.group_by(list(_COLUMNS)).aggregate([("id", "count"), ("bytes", "sum"), ("tokens", "sum")])
    names = [*_COLUMNS, "id_count", "bytes_sum", "tokens_sum"]
    return [[row[name] for name in names] for row in sums.to_pylist()]


def _dropped(old: pa.Table, path: AnyPath) -> list[list[Any]]:
    """[reason, documents, tokens] of the removed documents, by the reasons that this stage recorded."""
    files = [path.with_name(path.name.replace("documents-", "removed-")), path.with_name("removed.parquet")]
    reasons: dict[str, str] = {}
    for file in files:
        if file.exists():
            removed = read_shard(file, ["id", "reason"])
            own = removed.filter(pc.is_in(removed["id"], value_set=old["id"].combine_chunks()))
            reasons |= dict(zip(own["id"].to_pylist(), own["reason"].to_pylist(), strict=True))
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, tokens in zip(old["id"].to_pylist(), old["tokens"].to_pylist(), strict=True):
        if (reason := reasons.get(name)) is not None:
            sums[reason][0] += 1
            sums[reason][1] += tokens
    return [[reason, *count] for reason, count in sorted(sums.items())]
