"""deploy: approves an evaluated model for serving, if a rule over its evaluation holds.

The model becomes `NAME@approved`. The deployment NAME follows that alias; the control plane creates it when the job
ends, if there is none. A rule compares with the model that is deployed now, on the same held-out data:

    always
    bits_per_byte not worse than deployed
    bits_per_byte better than deployed          its interval is below the deployed model's value
    bits_per_byte < 2.5
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from moray.pipelines.evaluate.eval_report import EvalReport, EvalRow
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError
from moray.platform.core.serve_options import ServeOptions
from moray.platform.core.serving import checked_deployment_name
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.aliases import APPROVED, DEPLOYED
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.search import step_artifacts

_RULE = re.compile(r"(?P<metric>\w+) (?:(?P<how>not worse|better) than deployed|< (?P<most>\d+(?:\.\d+)?))")
_PREFIX = "eval_"
_LABELS = {"source": "all", "model": "model"}  # of the row that a rule reads


class DeployConfig(StepConfig):
    name: str | None = Field(
        None, pattern=r"^[a-z][a-z0-9_-]{0,62}$", description="name of the deployment (default: the recipe's name)"
    )
    when: str = Field(
        "bits_per_byte not worse than deployed",
        description="rule for the approval: `always`, `METRIC < NUMBER`, `METRIC not worse than deployed` or "
        "`METRIC better than deployed`; less is better",
    )
    replicas: int = Field(1, ge=1, le=1000, description="least number of replicas of a new deployment")
    most_replicas: int = Field(0, ge=0, le=1000, description="largest number of replicas; 0: a fixed number")

    @model_validator(mode="after")
    def _is_deployment(self) -> Self:
        try:
            ServeOptions(replicas=self.replicas, most_replicas=self.most_replicas)
            checked_deployment_name(self.name or "name")
        except InputError as error:
            raise ValueError(f"{error.message} ({error.hint})") from error
        return self

    @field_validator("when")
    @classmethod
    def _is_rule(cls, value: str) -> str:
        text = " ".join(value.split())
        if text != "always" and not _RULE.fullmatch(text):
            raise ValueError(
                "must be `always`, `METRIC < NUMBER`, `METRIC not worse than deployed` or `METRIC better than deployed`"
            )
        return text


class Deploy(Step[DeployConfig]):
    name: ClassVar[str] = "deploy"
    version: ClassVar[int] = 1
    Config = DeployConfig
    inputs: ClassVar[dict[str, str]] = {"model": "model", "evaluation": "evaluation"}
    produces: ClassVar[str] = "approval"

    def run(self, ctx: StepContext[DeployConfig]) -> None:
        model, report = ctx.inputs["model"], EvalReport.read(ctx.inputs["evaluation"].folder)
        name, store = ctx.config.name or ctx.name, ArtifactStore(ctx.home)
        approved, why = decide_approval(ctx.config.when, report, deployed_reports(ctx, store, name))
        if approved:
            store.aliases.set(name, APPROVED, model.reference)
        options = {"replicas": ctx.config.replicas, "most_replicas": ctx.config.most_replicas}
        write_json(
            ctx.folder / "approval.json",
            {"name": name, "alias": f"{name}@{APPROVED}", "model": model.reference, "approved": approved, "why": why,
             "options": options},
        )  # fmt: skip
        ctx.outcome = f"{'approved' if approved else 'not approved'}: {why}"


def decide_approval(rule: str, report: EvalReport, deployed: list[EvalReport] | None) -> tuple[bool, str]:
    """Whether a model with this report is approved, and why. deployed: the reports of the deployed model; None if
    nothing is deployed."""
    match = _RULE.fullmatch(rule)
    if match is None:
        return True, "always"
    mine = _row(report, match["metric"])
    if mine is None:
        return False, f"the evaluation has no {match['metric']}"
    shown = f"{mine.metric} {mine.value:.4g}"
    if match["most"]:
        return mine.value < float(match["most"]), f"{shown}, required below {match['most']}"
    if deployed is None:
        return True, f"{shown}, and nothing is deployed"
    rows = [row for one in deployed if (row := _row(one, mine.metric)) and row.data == mine.data]
    if not rows:
        return False, f"{shown}, but the deployed model was not evaluated on the same data"
    theirs = rows[0]
    high = mine.interval[1] if mine.interval else math.inf  # unknown: nobody can say that it is better
    bound = high if match["how"] == "better" else mine.value
    return bound <= theirs.value, f"{shown}, deployed {theirs.value:.4g}"


def deployed_reports(ctx: StepContext[Any], store: ArtifactStore, name: str) -> list[EvalReport] | None:
    """The evaluations of the model that is deployed under a name, or else approved; None if there is none."""
    aliases = store.aliases.all()
    reference = aliases.get(f"{name}@{DEPLOYED}") or aliases.get(f"{name}@{APPROVED}")
    if reference is None:
        return None
    fingerprint = reference.rpartition("/")[2]
    found = [
        one for one in step_artifacts(store, "evaluate") if one.manifest.inputs.get("model", "").endswith(fingerprint)
    ]
    return [EvalReport.read(ctx.artifact(one.reference).folder) for one in found]


def _row(report: EvalReport, metric: str) -> EvalRow | None:
    """The row over all sources. metric: with or without the prefix of evaluations."""
    names = (metric, f"{_PREFIX}{metric}")
    return next((row for row in report.rows if row.metric in names and row.labels == _LABELS), None)


step = Deploy()
