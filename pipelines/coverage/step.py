"""The step `coverage`: reports the tokens of each stage by source, language, domain and quality, as a page with charts.

It follows the manifests from the last stage back to the corpus (document_stages.py), so one input suffices.
`report.html` is self-contained; `report.json` has the same numbers. The artifact contains no documents.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from moray.pipelines.coverage.document_stages import Stage, stages_of
from moray.pipelines.coverage.measure import BYTES_PER_TOKEN, measure_shard
from moray.pipelines.coverage.page import coverage_page
from moray.pipelines.coverage.summary import Cells, Dropped, summarize
from moray.pipelines.shared.shards import file_bytes, input_shards, map_shards
from moray.platform.core.atomic import write_json, write_text
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.paths import AnyPath, remove_folder

_MEASURES = ".measures"


class CoverageConfig(StepConfig):
    title: str = "What the corpus covers"
    thin: float = Field(0.2, gt=0, le=1, description="report domains with less than this fraction of an even share")


class Coverage(Step[CoverageConfig]):
    name: ClassVar[str] = "coverage"
    version: ClassVar[int] = 1
    Config = CoverageConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents", "tokenizer": "tokenizer"}
    optional: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    produces: ClassVar[str] = "coverage-report"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: CoverageConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def run(self, ctx: StepContext[CoverageConfig]) -> None:
        stages = stages_of(ctx.inputs["documents"], ArtifactStore(ctx.home), ctx.artifact)
        tokenizer = ctx.inputs.get("tokenizer")
        folder = tokenizer.location if tokenizer else None
        before: AnyPath | None = None
        cells, dropped = [], []
        for number, stage in enumerate(stages):
            target = ctx.output / _MEASURES / str(number)
            own, removed = self._measure(ctx, stage, target, before, folder)
            cells.append(own)
            dropped.append(removed if number else _excluded(stage))
            before = target
        report: dict[str, Any] = {
            "title": ctx.config.title,
            "tokens": f"counted by {tokenizer.reference}"
            if tokenizer
            else f"estimated as {BYTES_PER_TOKEN} bytes per token",
            **summarize([stage.label for stage in stages], cells, dropped, ctx.config.thin),
        }
        write_json(ctx.folder / "report.json", report)
        write_text(ctx.folder / "report.html", coverage_page(report))
        remove_folder(ctx.output / _MEASURES)
        thin = [one["domain"] for one in report["thin"]]
        write_text(ctx.folder / "closing.txt", "coverage: file://${artifact}/report.html\n")
        last = report["stages"][-1]
        ctx.counts |= {
            "in:stages": len(stages),
            "documents": last["documents"],
            "tokens": last["tokens"],
            "domains:thin": len(thin),
        }
        ctx.outcome = f"{last['tokens'] / 1e6:.1f} M tokens; low coverage: {', '.join(thin) or 'none'}"

    def _measure(
        self,
        ctx: StepContext[CoverageConfig],
        stage: Stage,
        folder: AnyPath,
        before: AnyPath | None,
        tokenizer: AnyPath | None,
    ) -> tuple[Cells, Dropped]:
        shards = input_shards(stage.artifact.location)
        apply = partial(measure_shard, folder=folder, before=before, tokenizer=tokenizer)
        rows = map_shards(ctx, f"reading {stage.label}", shards, apply, "bytes", file_bytes)
        cells = [cell for row in rows for cell in json.loads(row["cells"])]
        return cells, [one for row in rows for one in json.loads(row["dropped"])]


def _excluded(stage: Stage) -> Dropped:
    """The documents that the first stage excluded, by its own counts. Their tokens are unknown."""
    counts = stage.artifact.manifest.counts.items()
    return [[name.removeprefix("dropped:"), int(n), 0.0] for name, n in counts if name.startswith("dropped:")]


step = Coverage()
