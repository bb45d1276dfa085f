"""Two evaluations of the same tasks, item by item."""

from __future__ import annotations

import json
from pathlib import Path

from moray.pipelines.evaluate.eval_report import EvalReport
from moray.pipelines.tasks.intervals import Comparison, compare_items
from moray.pipelines.tasks.step import ITEMS
from moray.platform.core.errors import InputError


def compare_evaluations(first: Path, second: Path) -> dict[tuple[str, str], Comparison]:
    """The comparison of each (task, metric) that both folders have. Raises InputError if they share no task."""
    reports = [EvalReport.read(folder) for folder in (first, second)]
    tasks = [{row.labels["task"]: row.data for row in report.rows if "task" in row.labels} for report in reports]
    shared = [name for name, data in tasks[0].items() if tasks[1].get(name) == data]
    if not shared:
        known = ", ".join(sorted({*tasks[0], *tasks[1]})) or "none"
        raise InputError(
            f"the evaluations share no task with the same items (tasks: {known})", "evaluate both on one file"
        )
    scores = [_scores(folder) for folder in (first, second)]
    return {
        (task, metric): compare_items(scores[0][task, metric], scores[1][task, metric])
        for task, metric in scores[0]
        if task in shared and (task, metric) in scores[1]
    }


def _scores(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Scores in the order of the items, by (task, metric)."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in (folder / ITEMS).read_text().splitlines():
        item = json.loads(line)
        for metric, value in item.items():
            if metric not in ("task", "id"):
                found.setdefault((item["task"], metric), []).append(value)
    return found
