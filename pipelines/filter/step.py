"""The step `filter`: drops documents by rules, language and model-based quality, and redacts PII in kept documents.

The recipe sets the rules and their limits. The first broken rule is the reason for removal, recorded in
`removed-*.parquet` next to the kept documents. A run that resumes after a kill processes only the missing shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from moray.pipelines.filter.config import FilterConfig
from moray.pipelines.filter.filter_shard import filter_shard
from moray.pipelines.shared.shards import file_bytes, input_shards, map_shards, pace
from moray.pipelines.shared.task_records import forget_records
from moray.platform.core.errors import InputError, RecipeError, nearest
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step


class Filter(Step[FilterConfig]):
    name: ClassVar[str] = "filter"
    version: ClassVar[int] = 2  # 2: `removed-*.parquet` has values and thresholds
    Config = FilterConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents", "quality": "quality-model"}
    optional: ClassVar[frozenset[str]] = frozenset({"quality"})
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: FilterConfig) -> frozenset[str]:
        return frozenset({"documents", "quality"})

    def check(self, config: FilterConfig, inputs: Mapping[str, str]) -> None:
        if wrong := config.out_of_order():
            raise RecipeError(f"{wrong}, which drops every document", "lower the minimum or raise the maximum")
        if config.min_quality is not None and "quality" not in inputs:
            raise RecipeError(
                "min_quality requires the input `quality`", "add the input `quality`: a step that uses quality-model"
            )
        if config.languages:
            from moray.pipelines.text.language import known_languages

            for language in config.languages:
                if language not in known_languages():
                    raise RecipeError(f"languages: unknown language {language!r}", nearest(language, known_languages()))
        if config.phone_regions:
            from phonenumbers import SUPPORTED_REGIONS

            for region in config.phone_regions:
                if region not in SUPPORTED_REGIONS:
                    raise RecipeError(f"phone_regions: unknown region {region!r}", nearest(region, SUPPORTED_REGIONS))

    def run(self, ctx: StepContext[FilterConfig]) -> None:
        shards = input_shards(ctx.inputs["documents"].location)
        model = ctx.inputs["quality"].location if "quality" in ctx.inputs else None
        apply = partial(filter_shard, folder=ctx.output, config=ctx.config, model=model)
        rows = map_shards(ctx, "filtering", shards, apply, "bytes", file_bytes, pace)
        totals: Counter[str] = Counter()
        for row in rows:
            totals.update({name: value for name, value in row.items() if isinstance(value, int)})
        dropped = {reason: totals[f"dropped:{reason}"] for reason in ctx.config.reasons()}
        if not totals["kept"]:
            raise InputError("filter drops every document", f"by rule: { ({r: n for r, n in dropped.items() if n}) }")
        forget_records(ctx.output)
        ctx.counts |= {
            "in:documents": totals["documents"],
            "out:documents": totals["kept"],
            "bytes": totals["kept_bytes"],
            **{name: n for name, n in totals.items() if name.startswith(("dropped:", "masked:", "edited")) and n},
        }
        ctx.outcome = "dropped " + (", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "nothing")


step = Filter()
