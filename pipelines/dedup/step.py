"""The step `dedup`: removes exact duplicates, and near duplicates found by MinHash-LSH and verified.

Each cluster keeps one document. With `index`, documents of earlier runs with the same index take part and have
priority, so a run removes the documents that one run over all inputs would remove. A killed run resumes and redoes only
the missing files.
"""

from __future__ import annotations

from typing import ClassVar

from moray.pipelines.dedup.config import DedupConfig
from moray.pipelines.dedup.phases import run_phases
from moray.pipelines.dedup.removal import warn_of_unknown_sources
from moray.pipelines.dedup.write import REASONS
from moray.pipelines.shared.documents import shard_paths
from moray.platform.core.differences import differences
from moray.platform.core.errors import RecipeError
from moray.platform.plan.context import StepContext
from moray.platform.plan.fingerprint import EARLIER
from moray.platform.plan.step import Step
from moray.platform.store.manifest import Manifest


class Dedup(Step[DedupConfig]):
    name: ClassVar[str] = "dedup"
    # 2: near duplicates are verified; shingles are of words. 3: new word hash. 4: new bands. 5: Unicode normalization
    version: ClassVar[int] = 5
    Config = DedupConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: DedupConfig) -> frozenset[str]:
        return frozenset({"documents", EARLIER})

    def chain(self, config: DedupConfig) -> str:
        return config.index

    def follow(self, config: DedupConfig, earlier: Manifest) -> None:
        if earlier.step_version != self.version:
            raise RecipeError(
                f"index {config.index!r} was made by version {earlier.step_version} of dedup, this is {self.version}",
                "set dedup.index to a new name, which starts an empty index",
            )
        if found := list(differences(earlier.config, config.model_dump(mode="json"))):
            raise RecipeError(
                f"index {config.index!r} was made with other settings: {', '.join(map(str, found))}",
                "restore those settings, or set dedup.index to a new name",
            )

    def run(self, ctx: StepContext[DedupConfig]) -> None:
        sketch = ctx.config.shingling
        curve = ", ".join(f"{sketch.chance(s / 10):.3g} at 0.{s}" for s in (5, 6, 7, 8, 9))
        ctx.note(
            f"{sketch.bands} bands of {sketch.rows} rows: two documents become candidates with probability {curve} "
            "similarity"
        )
        warn_of_unknown_sources(ctx, shard_paths(ctx.inputs["documents"].location))
        run = run_phases(ctx)
        rows = run.written
        reasons = [reason for reason in REASONS if reason != "seen" or ctx.config.index_form == "bloom"]
        ctx.counts |= {
            "in:documents": run.input.count,
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            **{reason: sum(row[reason] for row in rows) for reason in reasons},
            "candidates": run.decisions.pairs,
            "verified": run.decisions.similar,
        }
        if run.pairs.capped:
            ctx.note(f"{run.pairs.capped} LSH buckets are too large: only some of their pairs are compared")
        kinds = ", ".join(f"{ctx.counts[reason]:.0f} {reason}" for reason in reasons)
        ctx.outcome = f"removed {kinds}, in {ctx.counts['clusters']:.0f} clusters"


step = Dedup()
