"""evaluate-harness: tasks of the Language Model Evaluation Harness, on the serving engine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from pydantic import Field

from moray.pipelines.evaluate.eval_report import EvalReport, EvalRow
from moray.pipelines.tasks.intervals import wilson
from moray.pipelines.tasks.step import ITEMS, task_table
from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError, MorayError
from moray.platform.core.processes import usable_cores
from moray.platform.plan.config import StepConfig, operational, user_path
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_SEED = 1234
_WIDTH = 1.959963984540054  # standard errors on each side of a 95 % interval


class EvaluateHarnessConfig(StepConfig):
    tasks: tuple[str, ...] = Field(..., min_length=1, description="names of tasks, of the harness or in `task_folder`")
    task_folder: Path | None = operational(None, description="a folder with YAML files of tasks")
    shots: int | None = Field(None, ge=0, description="examples before each question; by default what the task says")
    limit: int | None = Field(None, ge=1, description="use only so many items of each task")
    downloads: bool = operational(False, description="let tasks download their data from Hugging Face")


class EvaluateHarness(Step[EvaluateHarnessConfig]):
    name: ClassVar[str] = "evaluate-harness"
    version: ClassVar[int] = 1
    Config = EvaluateHarnessConfig
    inputs: ClassVar[dict[str, str]] = {"model": "model"}
    produces: ClassVar[str] = "evaluation"

    def external(self, config: EvaluateHarnessConfig) -> list[ExternalFile]:
        if config.task_folder is None:
            return []
        folder = _folder(config)
        if not folder.is_dir():
            raise InputError(
                f"evaluate-harness.task_folder: {folder} is no folder", "name one with YAML files of tasks"
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file() and _counts(path.relative_to(folder)))
        for path in files:
            if path.suffix in (".yaml", ".yml"):
                _check_yaml(path)
        return [
            ExternalFile("task_folder", str(path.relative_to(folder)), path.stat().st_size, hash_file(path))
            for path in files
        ]

    def run(self, ctx: StepContext[EvaluateHarnessConfig]) -> None:
        found = _evaluate(ctx)
        lines = [json.dumps(line) for task, samples in found["samples"].items() for line in _lines(task, samples)]
        report = EvalReport(model=ctx.inputs["model"].reference, rows=tuple(_rows(found)))
        scored = {row.labels["task"] for row in report.rows}
        if unscored := [task for task in found["samples"] if task not in scored]:
            raise InputError(f"evaluate-harness: {unscored[0]} has no scores", "check `metric` in its `metric_list`")
        report.write(ctx.folder)
        write_text(ctx.folder / ITEMS, "\n".join(lines) + "\n")
        write_text(ctx.folder / "closing.txt", task_table(report))
        for row in report.rows:
            ctx.metric("harness_score", row.value, task=row.labels["task"], score=row.metric)
            ctx.score(row.labels["task"], row.metric, row.value, row.n, row.interval)
        ctx.counts |= {"in:items": len(lines)}
        first = {row.labels["task"]: row for row in reversed(report.rows)}
        ctx.outcome = ", ".join(f"{task} {row.metric} {row.value:.3g}" for task, row in first.items())


def _evaluate(ctx: StepContext[EvaluateHarnessConfig]) -> Mapping[str, Any]:
    """What the harness's `simple_evaluate` returns. Raises InputError."""
    config = ctx.config
    tasks = _task_manager(config)
    _check_tasks(config, tasks)
    from lm_eval.evaluator import simple_evaluate

    from moray.pipelines.serve.loading import load_engine
    from moray.pipelines.tasks.harness import EngineLM
    from moray.platform.core.serve_options import ServeOptions

    engine = load_engine(
        ctx.inputs["model"].folder, ServeOptions(threads=min(ctx.cluster.topology().cpus, usable_cores()))
    )
    try:
        with _inside(config):
            found = simple_evaluate(
                EngineLM(engine, lambda done, total: ctx.progress("answering", done, total, "requests")),
                tasks=list(config.tasks),
                num_fewshot=config.shots,
                limit=config.limit,
                task_manager=tasks,
                bootstrap_iters=1000,
                random_seed=_SEED,
                numpy_random_seed=_SEED,
                torch_random_seed=_SEED,
                fewshot_random_seed=_SEED,
            )
    except (MorayError, MemoryError):
        raise
    except Exception as error:  # of metrics and filters, of which the harness checks some only when it uses them
        told = f"{type(error).__name__}: {_first_cause(error)}"
        raise InputError(
            f"evaluate-harness: the harness failed: {told}", "check metrics and filters of the tasks"
        ) from error
    return found or {"results": {}, "samples": {}}


def _check_tasks(config: EvaluateHarnessConfig, tasks: TaskManager) -> None:
    """Raises InputError for tasks that do not exist, or cannot be loaded with their data."""
    missing = [name for name in config.tasks if name not in tasks.all_tasks]
    if missing:
        raise InputError(f"evaluate-harness.tasks: no task {', '.join(missing)}", _nearest(missing[0], tasks))
    for name in config.tasks:
        try:
            with _inside(config):
                tasks.load(name)
        except OSError as error:  # of `datasets`, for data that is neither here nor may be downloaded
            fix = "check the paths in its file" if config.downloads else "set `downloads: true`, or use local files"
            raise InputError(f"evaluate-harness: the data of {name} cannot be read: {error}", fix) from error
        except Exception as error:  # the harness and its templates raise all kinds
            told = f"{type(error).__name__}: {_first_cause(error)}"
            raise InputError(
                f"evaluate-harness: the task {name} cannot be loaded: {told}", "correct its file"
            ) from error


def _first_cause(error: BaseException) -> str:
    """The message of what an error was raised from at first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or "no message"


def _inside(config: EvaluateHarnessConfig) -> contextlib.AbstractContextManager[None]:
    """The folder of tasks as the current one, to which paths of data in their files are relative."""
    return contextlib.nullcontext() if config.task_folder is None else contextlib.chdir(_folder(config))


def _folder(config: EvaluateHarnessConfig) -> Path:
    assert config.task_folder is not None
    return user_path(config.task_folder).absolute()


def _check_yaml(file: Path) -> None:
    """Raises InputError for a task's file that the harness would ignore."""
    try:
        root = yaml.compose(file.read_bytes())
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f"{file}, line {place.line + 1}" if place else str(file)
        raise InputError(f"{where}: {getattr(error, 'problem', None) or 'no YAML'}", "correct the YAML") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{file}: no YAML mapping", "write `task: NAME`, and so on")


def _task_manager(config: EvaluateHarnessConfig) -> TaskManager:
    _allow_downloads(config.downloads)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("evaluate-harness needs lm-eval", "pip install 'moray[eval]'") from error
    if config.task_folder is not None:
        folder = str(_folder(config))
        own = TaskManager(include_path=folder, include_defaults=False)
        # Reading the thousands of files of the harness's own tasks takes seconds.
        return own if set(config.tasks) <= set(own.all_tasks) else TaskManager(include_path=folder)
    return TaskManager()


def _allow_downloads(allowed: bool) -> None:
    """Moray's processes work offline by default; two libraries read that when they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "0" if allowed else "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = not allowed  # type: ignore[attr-defined]


def _nearest(name: str, tasks: TaskManager) -> str:
    import difflib

    near = difflib.get_close_matches(name, tasks.all_tasks, 3)
    return f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists the harness's own"


def _around(value: float, width: float) -> tuple[float, float]:
    """An interval, within 0 and 1 for what looks like a share."""
    if 0 <= value <= 1:
        return max(0.0, value - width), min(1.0, value + width)
    return value - width, value + width


def _counts(path: Path) -> bool:
    """Whether a file of a folder of tasks may affect them: one that is neither hidden nor compiled."""
    return not any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _rows(found: Mapping[str, Any]) -> Iterator[EvalRow]:
    """A row for each metric of each task and group. Their keys are `acc,none`, and `acc_stderr,none` for the error."""
    for task, metrics in found["results"].items():
        documents = _documents(found, task)
        data = hashlib.sha256("".join(documents).encode()).hexdigest()
        lines = list(_lines(task, found["samples"].get(task, [])))
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            name = _named(metric, kind)
            right = [line[name] for line in lines if name in line]
            interval = None
            if right and math.isclose(sum(right) / len(right), value, abs_tol=1e-9):
                interval = wilson(sum(right), len(right))
            elif isinstance(error, int | float):
                interval = _around(value, _WIDTH * error)
            yield EvalRow(
                metric=name, labels={"task": task}, value=value, n=len(documents), interval=interval, data=data
            )


def _named(metric: str, kind: str) -> str:
    """kind: the filter of answers whose score it is."""
    return metric if kind == "none" else f"{metric} ({kind})"


def _documents(found: Mapping[str, Any], task: str) -> list[str]:
    """Hashes of the documents of a task, or of all tasks of a group."""
    if task in found["samples"]:  # which has a document once for each filter
        return list({sample["doc_id"]: sample["doc_hash"] for sample in found["samples"][task]}.values())
    members = found.get("group_subtasks", {}).get(task, ())
    return [document for member in members for document in _documents(found, member)]


def _lines(task: str, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each item's id, and the metrics that are 0 or 1 for all items."""
    items: dict[Any, dict[str, Any]] = {}
    for sample in samples:
        scores = {_named(name, sample.get("filter", "none")): sample[name] for name in sample["metrics"]}
        items.setdefault(sample["doc_id"], {}).update(scores)
    names = {name for scores in items.values() for name in scores}
    binary = sorted(name for name in names if all(_is_binary(scores.get(name)) for scores in items.values()))
    for number, scores in sorted(items.items()):
        yield {"task": task, "id": str(number), **{name: float(scores[name]) for name in binary}}


def _is_binary(score: Any) -> bool:
    return isinstance(score, int | float) and score in (0, 1)


step = EvaluateHarness()
