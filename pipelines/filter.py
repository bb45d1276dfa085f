"""filter: drops documents that break a few rules on words and lines, in the manner of Gopher (arXiv 2112.11446, A.1).

The rules that hold for code as well as prose are on by default; the first rule a document breaks is its reason, kept
in `removed-*.parquet` beside the documents that stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from moray.pipelines.documents import read_shard, shard_paths, text_bytes, write_parquet, write_shard
from moray.pipelines.shards import Row, map_shards
from moray.platform.errors import InputError
from moray.platform.step import Step, StepConfig, StepContext


class FilterConfig(StepConfig):
    """Thresholds; the defaults are Gopher's where they suit code too."""

    min_words: int = Field(50, ge=0)
    max_words: int = Field(100_000, gt=0)
    min_mean_word_length: float = Field(2.0, ge=0)
    max_mean_word_length: float = Field(16.0, gt=0)
    max_symbol_ratio: float = Field(0.3, ge=0, description="'#' and ellipses per word")
    max_ellipsis_lines: float = Field(0.3, ge=0, le=1, description="share of lines that end in an ellipsis")
    min_alphabetic_words: float = Field(0.5, ge=0, le=1, description="share of words with a letter")
    max_duplicate_lines: float = Field(0.5, ge=0, le=1, description="share of lines seen before in the document")


RULES = (
    "too_short",
    "too_long",
    "word_length",
    "symbols",
    "ellipses",
    "not_alphabetic",
    "repeated_lines",
)


def reason_to_drop(text: str, config: FilterConfig) -> str | None:
    """The first of `RULES` that `text` breaks, or None."""
    return next(_broken_rules(text, config), None)


def _broken_rules(text: str, config: FilterConfig) -> Iterator[str]:
    words = text.split()
    count = max(len(words), 1)
    if len(words) < config.min_words:
        yield "too_short"
    if len(words) > config.max_words:
        yield "too_long"
    if not config.min_mean_word_length <= sum(map(len, words)) / count <= config.max_mean_word_length:
        yield "word_length"
    if (text.count("#") + text.count("...") + text.count("\u2026")) / count > config.max_symbol_ratio:
        yield "symbols"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.endswith(("...", "\u2026")) for line in lines) > config.max_ellipsis_lines * len(lines):
        yield "ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) < config.min_alphabetic_words * count:
        yield "not_alphabetic"
    if len(lines) - len(set(lines)) > config.max_duplicate_lines * len(lines):
        yield "repeated_lines"


class Filter(Step[FilterConfig]):
    name: ClassVar[str] = "filter"
    version: ClassVar[int] = 1
    Config = FilterConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    needs_ray: ClassVar[bool] = True

    def run(self, ctx: StepContext[FilterConfig]) -> None:
        paths = shard_paths(ctx.inputs["documents"].folder)
        shards: list[Row] = [{"shard": i, "path": str(p), "size": p.stat().st_size} for i, p in enumerate(paths)]
        apply = partial(_filter_shard, folder=str(ctx.folder), config=ctx.config)
        rows = map_shards(ctx, "filtering", shards, apply, "bytes", lambda row: row["size"])
        dropped = {rule: sum(row[f"dropped:{rule}"] for row in rows) for rule in RULES}
        kept = sum(row["kept"] for row in rows)
        if not kept:
            raise InputError("filter drops every document", f"by rule: {dropped}")
        ctx.counts |= {
            "in:documents": kept + sum(dropped.values()),
            "out:documents": kept,
            "bytes": sum(row["bytes"] for row in rows),
            **{f"dropped:{rule}": n for rule, n in dropped.items() if n},
        }
        ctx.outcome = "dropped " + (", ".join(f"{n} {rule}" for rule, n in dropped.items() if n) or "nothing")


def _filter_shard(shard: Row, folder: str, config: FilterConfig) -> Row:
    """Filters one shard. Runs in a Ray worker."""
    path = Path(shard["path"])
    table = read_shard(path)
    reasons = [reason_to_drop(text.as_py(), config) for text in table["text"]]
    kept = table.filter(pa.array([reason is None for reason in reasons]))
    write_shard(Path(folder) / path.name, kept)
    removed = [(i.as_py(), reason) for i, reason in zip(table["id"], reasons, strict=True) if reason]
    ids, why = zip(*removed, strict=True) if removed else ((), ())
    write_parquet(
        Path(folder) / path.name.replace("documents-", "removed-"),
        pa.table({"id": pa.array(ids, pa.string()), "reason": pa.array(why, pa.string())}),
    )
    counts = Counter(why)
    return {
        "shard": shard["shard"],
        "kept": kept.num_rows,
        "bytes": text_bytes(text.as_py() for text in kept["text"]),
        **{f"dropped:{rule}": counts[rule] for rule in RULES},
    }


step = Filter()
