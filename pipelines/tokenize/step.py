"""tokenize: encodes documents and packs them into token sets, one per source, for the training and the held-out part.

Consecutive Documents shards of one source are packed together, in groups of about `group_bytes`. A group is a Ray Data
task and becomes one token shard. Groups depend only on the shards' sizes, so the result does not depend on the number
of workers. The held-out part is concatenated, because it is read document by document.

Text that spells a control token (`<|eos|>` in a document) is encoded as plain characters; only this step inserts
special ids. The encoder library is chosen once, with documents of every source (`encoders.py`); the ids do not depend
on it. A rerun after a kill processes the groups that have no record yet.

Sources that are token ids already (`pretokenized/`) are packed the same way, beside the documents or without any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from moray.actors.data.token_set import Shard, TokenVocabulary, write_index, write_token_shard
from moray.pipelines.shared.documents import read_shard, shard_paths
from moray.pipelines.shared.shards import Row, map_shards
from moray.pipelines.shared.task_records import forget_records, recorded
from moray.pipelines.split import PARTS
from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.tokenize.fim import Marks, fim_marks, framed, rearranged
from moray.pipelines.tokenize.pretokenized.pack_ids import PackTask, pack_ids
from moray.pipelines.tokenize.pretokenized.source import PretokenizedSource
from moray.pipelines.tokenize.pretokenized.sources import (
    check_sources,
    external_files,
    report_ids,
    source_tasks,
    submitted_sources,
)
from moray.pipelines.tokenize.sequence_packing import Packing, TokenDocuments, pack_documents, plan_sequences
from moray.pipelines.tokenizer.encoders import Choice, choose_encoder, encoder
from moray.pipelines.tokenizer.train import id_count, load_tokenizer, special_ids
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.config import StepConfig, added, operational
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step, Upload
from moray.platform.store.paths import AnyPath, any_path, local_file, open_ranges

_SAMPLE_BYTES = 1_000_000  # of documents on which the encoders must agree; takes the slower one half a second
_SAMPLE_SOURCES = 50
_BYTES_PER_TOKEN = 4  # of text, about


class TokenizeConfig(StepConfig):
    sequence_length: int = Field(256, ge=8, description="tokens in a packed sequence")
    fim_rate: float = Field(
        0.0, ge=0, le=1, description="share of training documents rearranged for fill-in-the-middle (FIM)"
    )
    packing: Packing = Field(
        "best-fit", description="packing of the training part: best-fit splits few documents; concatenate"
    )
    group_bytes: int = Field(
        64_000_000,
        gt=0,
        description="bytes of text, or a quarter as many ids, that are packed together; larger groups split fewer "
        "documents",
    )
    encoder: Literal["auto", "fast", "reference"] = operational(
        "auto",
        description="auto: gigatoken if it agrees with Hugging Face tokenizers, else tokenizers; fast: gigatoken, or "
        "an error; reference: tokenizers",
    )
    pretokenized: tuple[PretokenizedSource, ...] = added((), description="sources that are token ids already")


@dataclass(frozen=True)
class GroupTask:
    """Settings that are the same for all groups."""

    folder: AnyPath
    tokenizer: AnyPath
    encoder: Choice
    vocabulary: TokenVocabulary
    marks: Marks | None
    config: TokenizeConfig


class Tokenize(Step[TokenizeConfig]):
    name: ClassVar[str] = "tokenize"
    version: ClassVar[int] = 3  # 3: best fit; text that spells a control token is plain characters
    Config = TokenizeConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "split-documents", "tokenizer": "tokenizer"}
    produces: ClassVar[str] = "tokens"
    optional: ClassVar[frozenset[str]] = frozenset({"documents"})
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def check(self, config: TokenizeConfig, inputs: Mapping[str, str]) -> None:
        if "documents" not in inputs and not config.pretokenized:
            raise RecipeError("nothing to tokenize", "add the input `documents: STEP`, or `pretokenized` sources")
        if "documents" not in inputs and config.fim_rate:
            raise RecipeError("fim_rate needs the input `documents`", "remove it, or add `documents: STEP`")
        check_sources(config.pretokenized)

    def external(self, config: TokenizeConfig) -> list[ExternalFile]:
        return external_files(config.pretokenized)

    def submitted(self, config: TokenizeConfig, upload: Upload) -> dict[str, str]:
        return submitted_sources(config.pretokenized, upload)

    def reads_in_place(self, config: TokenizeConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def run(self, ctx: StepContext[TokenizeConfig]) -> None:
        folder = ctx.inputs["tokenizer"].folder
        vocabulary = TokenVocabulary(
            tokenizer=ctx.inputs["tokenizer"].fingerprint,
            size=id_count(load_tokenizer(folder)),
            **special_ids(folder),
        )
        documents = _shards(ctx) if "documents" in ctx.inputs else []
        if both := {shard["source"] for shard in documents} & {source.name for source in ctx.config.pretokenized}:
            raise InputError(
                f"tokenize.pretokenized: the documents have a source {min(both)!r} too",
                "give each source a unique name",
            )
        rows = self._encode(ctx, documents, vocabulary) + self._pack(ctx, vocabulary)
        self._write_indexes(ctx, rows, vocabulary)
        forget_records(ctx.output)
        self._summarize(ctx, rows)

    def _encode(self, ctx: StepContext[TokenizeConfig], shards: list[Row], vocabulary: TokenVocabulary) -> list[Row]:
        """Encodes and packs the documents. Returns a row for each token shard."""
        if not shards:
            return []
        tokenizer = ctx.inputs["tokenizer"]
        marks = fim_marks(load_tokenizer(tokenizer.folder)) if ctx.config.fim_rate else None
        chosen = self._encoder(ctx, tokenizer.folder, shards)
        job = GroupTask(ctx.output, tokenizer.location, chosen, vocabulary, marks, ctx.config)
        groups = _groups(shards, ctx.config.group_bytes)
        apply = partial(_tokenize_group, job=job)
        return map_shards(ctx, "tokenizing", groups, apply, "bytes", lambda row: row["size"])

    def _pack(self, ctx: StepContext[TokenizeConfig], vocabulary: TokenVocabulary) -> list[Row]:
        """Packs the pretokenized sources. Returns a row for each token shard."""
        config = ctx.config
        if not config.pretokenized:
            return []
        tokens = max(1, config.group_bytes // _BYTES_PER_TOKEN)
        job = PackTask(
            folder=ctx.output,
            tokenizer=ctx.inputs["tokenizer"].location,
            vocabulary=vocabulary,
            sources=config.pretokenized,
            sequence_length=config.sequence_length,
            packing=config.packing,
            tokens=tokens,
        )
        tasks = source_tasks(ctx, config.pretokenized, tokens)
        rows = map_shards(ctx, "packing", tasks, partial(pack_ids, job=job), "tokens", lambda row: row["tokens"])
        report_ids(ctx, config.pretokenized, rows)
        return [shard for row in rows for shard in json.loads(row["shards"])]

    def _encoder(self, ctx: StepContext[TokenizeConfig], folder: Path, shards: list[Row]) -> Choice:
        """The encoder of this run. Logs a warning if it is the slow one."""
        chosen, reason = choose_encoder(ctx.config.encoder, folder, *_sample(shards))
        if reason:
            ctx.note(f"{reason}; encoding with Hugging Face tokenizers, which is tens of times slower", level="warning")
        return chosen

    def _write_indexes(self, ctx: StepContext[TokenizeConfig], rows: list[Row], vocabulary: TokenVocabulary) -> None:
        """One index per part and source."""
        sets: dict[tuple[str, str], list[Shard]] = {}
        for row in rows:
            shard = Shard(**{field.name: row[field.name] for field in fields(Shard)})
            sets.setdefault((row["part"], row["source"]), []).append(shard)
        for (part, source), shards in sets.items():
            write_index(ctx.folder / part / source, shards, ctx.config.sequence_length, vocabulary)

    def _summarize(self, ctx: StepContext[TokenizeConfig], rows: list[Row]) -> None:
        totals = {part: sum(row["tokens"] for row in rows if row["part"] == part) for part in PARTS}
        train = [row for row in rows if row["part"] == "train"]
        sequences = sum(row["sequences"] for row in train)
        ctx.counts |= {
            "in:documents": sum(row["documents"] for row in rows),
            "out:tokens": sum(totals.values()),
            "train_tokens": totals["train"],
            "heldout_tokens": totals["heldout"],
            "train_sequences": sequences,
            "train_documents_cut": sum(row["cut"] for row in train),
        }
        size = sum(row["bytes"] for row in rows)
        fill = totals["train"] / max(1, sequences * ctx.config.sequence_length)
        cut = ctx.counts["train_documents_cut"] / max(1, sum(row["documents"] for row in train))
        sources = len({row["source"] for row in rows})
        ctx.outcome = (
            f"{sources} sources, {size / max(1, sum(totals.values())):.2f} bytes/token, "
            f"sequences {fill:.2%} full, {cut:.1%} of documents split"
        )


def _shards(ctx: StepContext[TokenizeConfig]) -> list[Row]:
    """The nonempty Documents shards in order, with part, source and uncompressed size."""
    folder = ctx.inputs["documents"].location
    paths = [(part, path) for part in PARTS for path in shard_paths(folder / part)]
    found = []
    with ThreadPoolExecutor(32) as threads:
        for done, row in enumerate(threads.map(_describe_shard, paths)):
            ctx.progress("listing", done + 1, len(paths), "shards")
            if row["source"]:
                found.append(row)
    return found


def _describe_shard(place: tuple[str, AnyPath]) -> Row:
    part, path = place
    with open_ranges(path) as file, pq.ParquetFile(file) as shard:
        metadata = shard.metadata
        sources = shard.read(["source"])["source"].unique().to_pylist()
    if len(sources) > 1:
        raise InputError(f"{path} mixes sources: {', '.join(sorted(sources))}", "write one source per shard")
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return {"part": part, "path": str(path), "source": sources[0] if sources else "", "size": size}


def _groups(shards: list[Row], group_bytes: int) -> list[Row]:
    """Groups of consecutive shards of one part and source. A group ends once it has at least `group_bytes`."""
    groups: list[Row] = []
    for shard in shards:
        key = {name: shard[name] for name in ("part", "source")}
        last = groups[-1] if groups else {}
        if not (key.items() <= last.items() and last["size"] < group_bytes):
            number = last["number"] + 1 if key.items() <= last.items() else 0
            groups.append({"shard": len(groups), "number": number, **key, "paths": [], "size": 0})
        groups[-1]["paths"].append(shard["path"])
        groups[-1]["size"] += shard["size"]
    return groups


def _sample(shards: list[Row]) -> tuple[list[str], list[str]]:
    """Ids and texts of some documents of every source, of at most about fifty sources."""
    first = {shard["source"]: shard["path"] for shard in reversed(shards)}
    sources = sorted(first)[:: -(-len(first) // _SAMPLE_SOURCES) or 1]
    names: list[str] = []
    texts: list[str] = []
    for source in sources:
        with local_file(any_path(first[source])) as local, pq.ParquetFile(local) as file:
            batch = next(file.iter_batches(256, columns=["id", "text"]))
        left = _SAMPLE_BYTES // len(sources)  # characters
        for name, text in zip(*(batch[column].to_pylist() for column in ("id", "text")), strict=True):
            if left > 0:
                names.append(f"document {name} of {source}")
                texts.append(text[:left])
                left -= len(text)
    return names, texts


def _tokenize_group(group: Row, job: GroupTask) -> Row:
    """Encodes and packs one group. Runs in a Ray worker."""
    return recorded(job.folder, f"group-{group['shard']:05d}", lambda: _write_group(group, job))


def _write_group(group: Row, job: GroupTask) -> Row:
    training = group["part"] == "train"
    documents = _encoded(group["paths"], job, job.config.fim_rate if training else 0.0)
    length = job.config.sequence_length
    pieces = plan_sequences(np.diff(documents.bounds), length, job.config.packing if training else "concatenate")
    packed, rows = pack_documents(documents, pieces, length, job.vocabulary)
    made = write_token_shard(job.folder / group["part"] / group["source"], group["number"], packed, rows)
    return {
        **{name: group[name] for name in ("shard", "part", "source")},
        **asdict(made),
        "cut": pieces.cut(length),
    }


def _encoded(paths: list[str], job: GroupTask, fim_rate: float) -> TokenDocuments:
    """The documents of some shards as tokens. Their text is no longer in memory when this returns."""
    table = pa.concat_tables([read_shard(any_path(path), ["id", "text"]) for path in paths]).combine_chunks()
    names = table["id"].to_pylist()
    column = table["text"].chunk(0).cast(pa.large_string())
    sizes = np.diff(text_buffers(column)[0])
    pieces, counts = rearranged(names, column, fim_rate)
    ids = encoder(job.encoder, job.tokenizer).encode(pieces)
    tokens = framed(ids, counts, job.vocabulary.bos, job.vocabulary.eos, job.marks)
    return TokenDocuments(names, sizes, tokens.ids, tokens.bounds)


step = Tokenize()
