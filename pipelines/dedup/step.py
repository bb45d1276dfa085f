"""dedup: exact copies, then near duplicates by MinHash-LSH whose similarity is verified; each cluster keeps one.

With `index`, what earlier runs of that name have seen counts too, as older and so kept first: what goes is what a run
over all of them would remove. A rerun after a kill goes on with the files that are not there yet.
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
from moray.platform.plan.step import Step
from moray.platform.store.manifest import Manifest


class Dedup(Step[DedupConfig]):
    name: ClassVar[str] = "dedup"
    # 2: near duplicates are verified; words are words. 3: other hashes of words. 4: bands. 5: every form of Unicode
    version: ClassVar[int] = 5
    Config = DedupConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def chain(self, config: DedupConfig) -> str:
        return config.index

    def follow(self, config: DedupConfig, earlier: Manifest) -> None:
        if earlier.step_version != self.version:
            raise RecipeError(
                f"index {config.index!r} was made by version {earlier.step_version} of dedup, this is {self.version}",
                "use another name for the index: it begins anew",
            )
        if found := list(differences(earlier.config, config.model_dump(mode="json"))):
            raise RecipeError(
                f"index {config.index!r} was made with other settings: {', '.join(map(str, found))}",
                "use those, or another name for the index",
            )

    def run(self, ctx: StepContext[DedupConfig]) -> None:
        sketch = ctx.config.shingling
        curve = ", ".join(f"{sketch.chance(s / 10):.3g} at 0.{s}" for s in (5, 6, 7, 8, 9))
        ctx.note(f"two documents share one of {sketch.bands} keys of {sketch.rows} with probability {curve} similarity")
        warn_of_unknown_sources(ctx, shard_paths(ctx.inputs["documents"].folder))
        run = run_phases(ctx)
        rows = run.written
        why = [one for one in REASONS if one != "seen" or ctx.config.index_form == "bloom"]
        ctx.counts |= {
            "in:documents": run.crawl.count,
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            **{one: sum(row[one] for row in rows) for one in why},
            "candidates": run.decisions.pairs,
            "verified": run.decisions.alike,
        }
        if run.pairs.capped:
            ctx.note(f"{run.pairs.capped} keys are shared by many: not every pair of theirs is looked at")
        kinds = ", ".join(f"{ctx.counts[one]:.0f} {one}" for one in why)
        ctx.outcome = f"removed {kinds}, in {ctx.counts['clusters']:.0f} clusters"


step = Dedup()
