"""tokenize: documents into packed token sets, one per source, for the training and the held-out part.

Each Documents shard becomes one token shard of its source in a Ray Data task; the indexes are written last. Text that
spells a special token (`<|eos|>` in a document) is encoded as plain characters: only this step places special ids.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from moray.actors.token_set import Shard, Vocabulary, write_index, write_shard
from moray.pipelines.documents import read_shard, shard_paths
from moray.pipelines.fim import Marks, encode_middles_last, fim_marks
from moray.pipelines.shards import Row, map_shards
from moray.pipelines.split import PARTS
from moray.pipelines.tokenizer import load_tokenizer, special_ids
from moray.platform.step import Step, StepConfig, StepContext


class TokenizeConfig(StepConfig):
    sequence_length: int = Field(256, ge=8, description="tokens in a packed sequence")
    fim_rate: float = Field(0.0, ge=0, le=1, description="share of the training documents whose middle comes last")


class Tokenize(Step[TokenizeConfig]):
    name: ClassVar[str] = "tokenize"
    version: ClassVar[int] = 2  # 2: the index has the largest id of each shard
    Config = TokenizeConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "split-documents", "tokenizer": "tokenizer"}
    produces: ClassVar[str] = "tokens"
    needs_ray: ClassVar[bool] = True

    def run(self, ctx: StepContext[TokenizeConfig]) -> None:
        folder = ctx.inputs["tokenizer"].folder
        vocabulary = Vocabulary(
            tokenizer=ctx.inputs["tokenizer"].fingerprint,
            size=load_tokenizer(folder).get_vocab_size(),
            **special_ids(folder),
        )
        marks = fim_marks(load_tokenizer(folder)) if ctx.config.fim_rate else None
        shards = _shards(ctx.inputs["documents"].folder)
        apply = partial(
            _tokenize_shard,
            folder=str(ctx.folder),
            tokenizer=str(folder),
            length=ctx.config.sequence_length,
            vocabulary=vocabulary,
            marks=marks,
            fim_rate=ctx.config.fim_rate,
        )
        rows = map_shards(ctx, "tokenizing", shards, apply, "bytes", lambda row: row["size"])
        totals = self._write_indexes(ctx, rows, vocabulary)
        ctx.counts |= {
            "in:documents": sum(row["documents"] for row in rows),
            "out:tokens": sum(totals.values()),
            "train_tokens": totals["train"],
            "heldout_tokens": totals["heldout"],
        }
        sources = {row["source"] for row in rows if row["documents"]}
        size = sum(row["bytes"] for row in rows)
        ctx.outcome = f"{len(sources)} sources, {size / max(1, sum(totals.values())):.2f} bytes/token"

    def _write_indexes(
        self, ctx: StepContext[TokenizeConfig], rows: list[Row], vocabulary: Vocabulary
    ) -> dict[str, int]:
        """One index per part and source that has documents; returns tokens per part."""
        totals = dict.fromkeys(PARTS, 0)
        groups: dict[tuple[str, str], list[Shard]] = {}
        for row in rows:
            if row["documents"]:
                shard = Shard(**{field.name: row[field.name] for field in fields(Shard)})
                groups.setdefault((row["part"], row["source"]), []).append(shard)
                totals[row["part"]] += shard.tokens
        for (part, source), shards in groups.items():
            write_index(ctx.folder / part / source, shards, ctx.config.sequence_length, vocabulary)
        return totals


def _shards(folder: Path) -> list[Row]:
    return [
        {"shard": i, "number": number, "part": part, "path": str(path), "size": path.stat().st_size}
        for i, (part, number, path) in enumerate(
            (part, number, path) for part in PARTS for number, path in enumerate(shard_paths(folder / part))
        )
    ]


def _tokenize_shard(
    shard: Row, folder: str, tokenizer: str, length: int, vocabulary: Vocabulary, marks: Marks | None, fim_rate: float
) -> Row:
    """Tokenizes one Documents shard, which is of one source. Runs in a Ray worker."""
    table = read_shard(Path(shard["path"]), ["id", "text", "source"])
    sources = set(table["source"].to_pylist())
    row = {"shard": shard["shard"], "part": shard["part"], "number": shard["number"]}
    if not sources:
        return {**row, "source": "", **asdict(Shard(row["number"], 0, 0, 0, 0, 0, ""))}
    if len(sources) > 1:
        raise ValueError(f"{shard['path']} mixes sources: {sorted(sources)}")
    source = sources.pop()
    model = load_tokenizer(Path(tokenizer))
    model.encode_special_tokens = True
    names, texts = table["id"].to_pylist(), table["text"].to_pylist()
    if marks is None or shard["part"] != "train":
        encoded = [encoding.ids for encoding in model.encode_batch(texts, add_special_tokens=False)]
    else:
        encoded = encode_middles_last(model, marks, names, texts, fim_rate)
    documents = [(name, ids, len(text.encode())) for name, ids, text in zip(names, encoded, texts, strict=True)]
    made = write_shard(Path(folder) / shard["part"] / source, shard["number"], documents, length, vocabulary)
    return {**row, "source": source, **asdict(made)}


step = Tokenize()
