"""synthesize: generates documents: verified mathematics and code, and rephrasings.

Ray Data tasks generate and verify items, compare them with each other and the corpus, and write them. An item depends
only on its generator, its number and the seed, so the result does not depend on shards and workers. A finished item is
immediately written to its shard's log, so a rerun after a kill does not generate it again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa

from moray.actors.sandbox.limits import SandboxRefused
from moray.actors.sandbox.run import refusal
from moray.pipelines.shared.documents import (
    SCHEMA,
    document_id,
    read_shard,
    shard_name,
    text_bytes,
    write_parquet,
    write_shard,
)
from moray.pipelines.shared.shards import Row, input_shards, map_shards
from moray.pipelines.synthesize import item_copies
from moray.pipelines.synthesize.budget_tracker import RemoteBudgetTracker, Spent, start_budget_tracker
from moray.pipelines.synthesize.config import SynthesizeConfig, Teacher
from moray.pipelines.synthesize.generators.generator import GeneratorContext, SourceDocument
from moray.pipelines.synthesize.generators.open_generator import open_generator
from moray.pipelines.synthesize.generators.rephrase import draw_documents
from moray.pipelines.synthesize.items import FinishedItem, Log
from moray.pipelines.synthesize.produce import WorkDir, produce
from moray.pipelines.synthesize.teacher import TeacherClient
from moray.platform.core.errors import InputError, StepFailed
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.paths import AnyPath, StorePath, any_path, remove_folder

_WORK = ".work"


class Synthesize(Step[SynthesizeConfig]):
    name: ClassVar[str] = "synthesize"
    version: ClassVar[int] = 3  # 2, 3: changed word hashes
    Config = SynthesizeConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents", "corpus": "documents"}
    optional: ClassVar[frozenset[str]] = frozenset({"documents", "corpus"})
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: SynthesizeConfig) -> frozenset[str]:
        return frozenset({"documents", "corpus"})

    def check(self, config: SynthesizeConfig, inputs: Mapping[str, str]) -> None:
        context = GeneratorContext(config.sandbox.limits(), config.unsafe_sandbox)
        for generator in config.generators:
            open_generator(generator, context).check(inputs)

    def run(self, ctx: StepContext[SynthesizeConfig]) -> None:
        self._check_sandbox(ctx)
        shards = self._shards(ctx)
        spent_file = ctx.output / _WORK / "spent.jsonl"
        tracker = start_budget_tracker(spent_file, ctx.config.budget) if ctx.config.teacher else None
        made = self._make(ctx, shards, tracker)
        spent = tracker.spent() if tracker else Spent()
        if ctx.config.teacher:
            self._note_unanswered(ctx, made, ctx.config.teacher)
        found = self._copies(ctx, shards)
        write_copies(ctx.output / _WORK, found)
        write = partial(write_items, folder=ctx.output, config=ctx.config)
        rows = map_shards(ctx, "writing", shards, write, "items", lambda row: row["end"] - row["begin"])
        self._report(ctx, rows, spent, sum(row["before"] for row in made))
        remove_folder(ctx.output / _WORK)

    def _check_sandbox(self, ctx: StepContext[SynthesizeConfig]) -> None:
        if not any(generator.runs_code for generator in ctx.config.generators):
            return
        reason = refusal()
        if reason and not ctx.config.unsafe_sandbox:
            raise SandboxRefused(
                f"no sandbox on this system: {reason}",
                "run where user namespaces are allowed, or set unsafe_sandbox: true and accept the risk",
            )
        if ctx.config.unsafe_sandbox:
            text = (
                "UNSAFE: generated code can read and write this user's files; only time, memory and sockets are limited"
            )
            ctx.note(text, "warning")

    def _shards(self, ctx: StepContext[SynthesizeConfig]) -> list[Row]:
        """One row per range [begin, end) of a generator's items, in the order of the recipe."""
        shards: list[Row] = []
        for place, generator in enumerate(ctx.config.generators):
            drawn: list[SourceDocument] = []
            items = generator.items
            if generator.reads_documents:
                drawn = draw_documents(ctx.inputs["documents"].location, items, ctx.config.seed)
                items = len(drawn)
            for begin in range(0, items, ctx.config.shard_items):
                end = min(begin + ctx.config.shard_items, items)
                log = ctx.output / _WORK / f"made-{len(shards):05d}.jsonl"
                shards.append(
                    {
                        "shard": len(shards),
                        "generator": place,
                        "begin": begin,
                        "end": end,
                        "log": str(log),
                        "documents": drawn[begin:end],
                    }
                )
        return shards

    def _make(
        self, ctx: StepContext[SynthesizeConfig], shards: list[Row], tracker: RemoteBudgetTracker | None
    ) -> list[Row]:
        connect, teacher = None, ctx.config.teacher
        if teacher and tracker:
            threads = -(-teacher.concurrency // max(min(ctx.cluster.topology().cpus, len(shards)), 1))
            cache = StorePath(ctx.stored.root, "teacher") if ctx.stored else ctx.home.cache / "teacher"
            connect = partial(TeacherClient, teacher, ctx.config.budget, tracker, cache, threads)

        def detail(totals: Counter[str], seconds: float) -> str:
            accepted, rejected = totals["accepted"], totals["rejected_items"]
            money = f", {tracker.spent().dollars:.4f} dollars" if tracker else ""
            return f"{accepted / max(accepted + rejected, 1):.0%} accepted{money}"

        make = partial(produce, config=ctx.config, work=WorkDir(ctx.output / _WORK), connect=connect)
        return map_shards(ctx, "making", shards, make, "items", lambda row: row["end"] - row["begin"], detail)

    def _note_unanswered(self, ctx: StepContext[SynthesizeConfig], made: list[Row], teacher: Teacher) -> None:
        counts: Counter[str] = Counter()
        for row in made:
            counts += Counter(json.loads(row["unanswered"]))
        if counts["budget"]:
            ctx.note(f"the budget is exhausted: {counts['budget']} items were not requested", "warning")
        if not counts["engine"]:
            return
        total = sum(generator.items for generator in ctx.config.generators)
        text = f"{counts['engine']} of {total} items have no answer: {teacher.url} failed"
        if counts["engine"] > ctx.config.unanswered * total:
            raise StepFailed(text, "run the same command again to request only these items, or raise `unanswered`")
        ctx.note(text, "warning")

    def _copies(self, ctx: StepContext[SynthesizeConfig], shards: list[Row]) -> dict[str, list[Any]]:
        """Item key -> [reason, key or id of the original, similarity]."""
        work = ctx.output / _WORK
        map_shards(ctx, "sketching", shards, partial(item_copies.sketch_shard, folder=work), "shards", lambda row: 1)
        sketches = [item_copies.sketch_path(work, shard["shard"]) for shard in shards]
        found: dict[str, list[Any]] = {
            key: ["repeated", of, 1.0] for key, of in item_copies.repeated_documents(sketches).items()
        }
        if "corpus" in ctx.inputs:
            corpus = input_shards(ctx.inputs["corpus"].location)
            compare = partial(item_copies.compare_shard, sketches=sketches, similarity=ctx.config.similarity)
            rows = map_shards(ctx, "comparing", corpus, compare, "bytes", lambda row: row["size"])
            for key, of, score in sorted(entry for row in rows for entry in json.loads(row["copies"])):
                if key not in found or (found[key][0] == "corpus" and found[key][2] < score):
                    found[key] = ["corpus", of, score]
        return found

    def _report(self, ctx: StepContext[SynthesizeConfig], rows: list[Row], spent: Spent, before: int) -> None:
        reasons: Counter[str] = Counter()
        for row in rows:
            reasons += Counter(json.loads(row["rejected"]))
        accepted = sum(row["accepted"] for row in rows)
        if not accepted:
            raise InputError("synthesize: all items were rejected", f"by reason: {dict(reasons)}")
        ctx.counts |= {
            "in:items": accepted + sum(reasons.values()),
            "out:documents": accepted,
            "bytes": sum(row["bytes"] for row in rows),
            "found_finished": before,
            "requests": spent.requests,
            "prompt_tokens": spent.prompt_tokens,
            "answer_tokens": spent.answer_tokens,
            "dollars": round(spent.dollars, 6),
            **{f"dropped:{reason}": count for reason, count in sorted(reasons.items())},
        }
        rate = accepted / (accepted + sum(reasons.values()))
        ctx.outcome = f"{accepted} documents, {rate:.0%} of the items accepted, {spent.dollars:.4f} dollars"


def write_copies(work: AnyPath, found: Mapping[str, list[Any]]) -> None:
    keys = sorted(found)
    columns: list[tuple[str, pa.DataType]] = [
        ("reason", pa.string()),
        ("of", pa.string()),
        ("similarity", pa.float64()),
    ]
    table = {"key": pa.array(keys, pa.string())}
    table |= {name: pa.array([found[key][i] for key in keys], kind) for i, (name, kind) in enumerate(columns)}
    write_parquet(work / "copies.parquet", pa.table(table))


def write_items(shard: Row, folder: AnyPath, config: SynthesizeConfig) -> Row:
    """Writes a shard's documents and rejected items. Runs in a Ray worker."""
    generator = config.generators[shard["generator"]]
    work, log = folder / _WORK, Log(any_path(shard["log"]))
    table = read_shard(work / "copies.parquet")
    copies = dict(zip(table["key"].to_pylist(), table.select(["reason", "of"]).to_pylist(), strict=True))
    accepted = item_copies.accepted(log)
    kept = [made for made in accepted if made.key not in copies]
    bad = [made for made in log.read().values() if made.reason]
    bad += [
        FinishedItem(one.key, one.text, copies[one.key]["reason"], f"copy of {copies[one.key]['of']}", one.meta)
        for one in accepted
        if one.key in copies
    ]
    lines = (work / f"unanswered-{shard['shard']:05d}.jsonl").read_text().splitlines()
    bad += [FinishedItem(**json.loads(line)) for line in lines]
    name = shard_name(shard["shard"])
    written = documents(kept, generator.name, generator.license)
    write_shard(folder / name, written)
    rejected = documents(bad, generator.name, generator.license)
    for column in ("reason", "detail"):
        rejected = rejected.append_column(column, pa.array([getattr(one, column) for one in bad], pa.string()))
    write_parquet(folder / name.replace("documents-", "rejected-"), rejected)
    return {
        "shard": shard["shard"],
        "accepted": len(kept),
        "rejected": json.dumps(Counter(made.reason for made in bad)),
        "bytes": text_bytes(written["text"]),
    }


def documents(made: Iterable[FinishedItem], source: str, license: str) -> pa.Table:
    rows = [
        {
            "id": document_id(source, one.key),
            "text": one.text,
            "source": source,
            "license": license,
            "meta": list(one.meta.items()),
        }
        for one in made
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


step = Synthesize()
