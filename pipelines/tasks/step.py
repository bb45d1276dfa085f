"""evaluate-tasks: accuracy on local task files, with intervals, and every item's result for paired comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from moray.pipelines.evaluate.eval_report import EvalReport, EvalRow
from moray.pipelines.tasks.intervals import wilson
from moray.pipelines.tasks.task_file import TaskItem, read_task
from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError
from moray.platform.core.processes import usable_cores
from moray.platform.plan.config import StepConfig, operational, user_path
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file

ITEMS = "items.jsonl"


class EvaluateTasksConfig(StepConfig):
    tasks: tuple[Path, ...] = operational(..., min_length=1, description="files of JSON lines; docs/models.md")
    max_tokens: int = Field(256, ge=1, description="of an answer that follows a schema")


class EvaluateTasks(Step[EvaluateTasksConfig]):
    name: ClassVar[str] = "evaluate-tasks"
    version: ClassVar[int] = 1
    Config = EvaluateTasksConfig
    inputs: ClassVar[dict[str, str]] = {"model": "model"}
    produces: ClassVar[str] = "evaluation"

    def external(self, config: EvaluateTasksConfig) -> list[ExternalFile]:
        found = {user_path(path).stem: user_path(path) for path in config.tasks}
        if len(found) < len(config.tasks):
            raise InputError("evaluate-tasks.tasks: two files have the same name", "rename one of them")
        for path in found.values():
            read_task(path)
        return [ExternalFile("tasks", name, path.stat().st_size, hash_file(path)) for name, path in found.items()]

    def run(self, ctx: StepContext[EvaluateTasksConfig]) -> None:
        tasks = {user_path(path).stem: user_path(path) for path in ctx.config.tasks}
        items = {name: read_task(path) for name, path in tasks.items()}
        scores: dict[str, dict[str, list[float]]] = {}
        lines: list[str] = []
        for name, one, results in self._answers(ctx, items):
            for metric, value in results.items():
                scores.setdefault(name, {}).setdefault(metric, []).append(value)
            lines.append(json.dumps({"task": name, "id": one.id, **results}))
        rows = [
            EvalRow(
                metric=metric,
                labels={"task": name},
                value=sum(values) / len(values),
                n=len(values),
                interval=wilson(sum(values), len(values)),
                data=hash_file(tasks[name]),
            )
            for name, metrics in scores.items()
            for metric, values in metrics.items()
        ]
        report = EvalReport(model=ctx.inputs["model"].reference, rows=tuple(rows))
        report.write(ctx.folder)
        write_text(ctx.folder / ITEMS, "\n".join(lines) + "\n")
        write_text(ctx.folder / "closing.txt", task_table(report))
        for row in rows:
            ctx.metric(row.metric, row.value, task=row.labels["task"])
            ctx.score(row.labels["task"], row.metric.removeprefix("task_"), row.value, row.n, row.interval)
        ctx.counts |= {"in:items": len(lines)}
        ctx.outcome = ", ".join(f"{row.labels['task']} {row.value:.1%}" for row in rows if row.metric != _PER_BYTE)

    def _answers(self, ctx: StepContext[EvaluateTasksConfig], items: dict[str, list[TaskItem]]) -> Any:
        """(task, item, scores) of every item; reports progress."""
        from moray.pipelines.serve.loading import load_engine
        from moray.pipelines.tasks.scoring import answer_items
        from moray.platform.core.serve_options import ServeOptions

        engine = load_engine(
            ctx.inputs["model"].folder, ServeOptions(threads=min(ctx.cluster.topology().cpus, usable_cores()))
        )
        total, done = sum(map(len, items.values())), 0
        for name, task in items.items():
            for result in answer_items(engine, task, ctx.config.max_tokens):
                done += 1
                ctx.progress("answering", done, total, "items")
                yield name, result.item, result.scores


_PER_BYTE = "task_accuracy_per_byte"


def task_table(report: EvalReport) -> str:
    """The rows of a report for people."""
    width = max([4, *(len(row.labels["task"]) for row in report.rows)]) + 2
    lines = [f"{'task':<{width}}{'metric':<26}{'value':>8}{'95 % interval':>20}{'items':>8}"]
    for row in report.rows:
        interval = "unknown" if row.interval is None else " to ".join(map(_told, row.interval))
        lines.append(f"{row.labels['task']:<{width}}{row.metric:<26}{_told(row.value):>8}{interval:>20}{row.n:8,}")
    return "\n".join(lines) + "\n"


def _told(value: float) -> str:
    """A share as a percentage; a perplexity, for instance, as it is."""
    return f"{value:.1%}" if -1 < value <= 1 else f"{value:.3f}"


step = EvaluateTasks()
