"""register: registers an evaluated model as the next version of its name in MLflow and as the alias `NAME@newest`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from moray.pipelines.evaluate.eval_report import EvalReport
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError
from moray.platform.core.events import MetricEvent
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.run.mlflow_tracking import register_model
from moray.platform.store.aliases import NEWEST
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import find_artifact


class RegisterConfig(StepConfig):
    name: str | None = Field(
        None, pattern=r"^[a-z0-9][a-z0-9_-]*$", description="name of the model (default: the recipe's name)"
    )


class Register(Step[RegisterConfig]):
    name: ClassVar[str] = "register"
    version: ClassVar[int] = 1
    Config = RegisterConfig
    inputs: ClassVar[dict[str, str]] = {"model": "model", "evaluation": "evaluation"}
    produces: ClassVar[str] = "registration"

    def run(self, ctx: StepContext[RegisterConfig]) -> None:
        model, report = ctx.inputs["model"], EvalReport.read(ctx.inputs["evaluation"].folder)
        if report.model != model.reference:
            raise InputError(
                f"register: the evaluation is of {report.model}, not of {model.reference}",
                "use the same model as input of register and evaluate",
            )
        name = ctx.config.name or ctx.name
        store = ArtifactStore(ctx.home)
        lineage = list(ancestors(model, store))
        metrics = {
            "/".join([f"moray_{row.metric}", *(value for _, value in sorted(row.labels.items()))]): row.value
            for row in report.rows
        }
        params = {
            f"{artifact.manifest.step}.{key}": value
            for artifact in lineage
            for key, value in artifact.manifest.config.items()
            if key != "sources"
        }
        ctx.progress("registering", 0, 1, "models")
        registered = register_model(
            ctx.home,
            name,
            model.folder,
            list(_curves(ctx, lineage)),
            metrics,
            params,
            {"moray.run": ctx.run.name, "moray.artifact": model.reference},
        )
        store.aliases.set(name, NEWEST, model.reference)
        write_json(
            ctx.folder / "registration.json",
            {
                "name": name,
                "version": registered.version,
                "alias": f"{name}@{NEWEST}",
                "model": model.reference,
                "mlflow_run": registered.run_id,
            },
        )
        ctx.progress("registering", 1, 1, "models")
        ctx.counts |= {"out:version": registered.version}
        ctx.outcome = f"{name}@{NEWEST} is version {registered.version}"


def ancestors(artifact: Artifact, store: ArtifactStore) -> Iterator[Artifact]:
    """`artifact` and all artifacts that it was made from, each once."""
    seen: set[str] = set()
    waiting = [artifact]
    while waiting:
        current = waiting.pop()
        if current.reference in seen:
            continue
        seen.add(current.reference)
        yield current
        waiting += [find_artifact(store, reference) for reference in current.manifest.inputs.values()]


def _curves(ctx: StepContext[Any], lineage: list[Artifact]) -> Iterator[MetricEvent]:
    """The training metrics of the run that made the checkpoint, which may be an earlier run."""
    for artifact in lineage:
        if artifact.manifest.produces == "checkpoint":
            events = ctx.events_of(artifact.manifest.run)
            yield from (e for e in events if isinstance(e, MetricEvent) and e.name.startswith("train_"))


step = Register()
