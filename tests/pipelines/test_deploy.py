"""deploy: rules over evaluations, the alias they move, and the deployment that the control plane makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moray.pipelines.deploy import DeployConfig, decide_approval, step
from moray.pipelines.evaluate.eval_report import EvalReport, EvalRow
from moray.platform.control.approvals import deploy_approved
from moray.platform.control.choices import LOCAL
from moray.platform.control.database import Database
from moray.platform.control.deployment_rounds import DeploymentRounds
from moray.platform.control.deployments import Deployments
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.core.cluster import Topology
from moray.platform.core.events import EventLog, StepEvent
from moray.platform.core.home import Home
from moray.platform.store.artifacts import Artifact, ArtifactStore
from tests.step_contexts import context_for, manifest_of


def report(value: float, data: str = "d", model: str = "export/aa", interval: tuple[float, float] | None = None):
    labels = {"source": "all", "model": "model"}
    around = interval or (value - 0.05, value + 0.05)
    row = EvalRow(metric="eval_bits_per_byte", labels=labels, value=value, n=9, interval=around, data=data)
    other = EvalRow(metric="eval_bits_per_byte", labels={"source": "x", "model": "model"}, value=9.0, n=1,
                    interval=(9.0, 9.0), data=data)  # fmt: skip
    return EvalReport(model=model, rows=(other, row))


@pytest.mark.parametrize(
    ("rule", "deployed", "approved", "said"),
    [
        ("always", [report(1.0)], True, "always"),
        ("bits_per_byte not worse than deployed", None, True, "nothing is deployed"),
        ("bits_per_byte not worse than deployed", [report(2.0)], True, "deployed 2"),
        ("bits_per_byte not worse than deployed", [report(1.99)], False, "deployed 1.99"),
        ("bits_per_byte not worse than deployed", [report(3.0, data="other")], False, "not evaluated on the same data"),
        ("bits_per_byte not worse than deployed", [report(9.0, data="other"), report(2.1)], True, "deployed 2.1"),
        ("bits_per_byte not worse than deployed", [], False, "not evaluated on the same data"),
        ("bits_per_byte better than deployed", [report(2.04)], False, "deployed 2.04"),
        ("bits_per_byte better than deployed", [report(2.06)], True, "deployed 2.06"),
        ("eval_bits_per_byte < 2.5", [report(1.0)], True, "required below 2.5"),
        ("bits_per_byte < 2.0", [report(9.0)], False, "required below 2.0"),
        ("accuracy not worse than deployed", [report(9.0)], False, "the evaluation has no accuracy"),
    ],
)
def test_rules(rule: str, deployed: list[EvalReport] | None, approved: bool, said: str) -> None:
    decision, why = decide_approval(DeployConfig(when=rule).when, report(2.0), deployed)
    assert (decision, said in why) == (approved, True), why


def test_nothing_without_an_interval_is_better() -> None:
    unsure = EvalReport(model="m", rows=tuple(one.model_copy(update={"interval": None}) for one in report(2.0).rows))
    assert not decide_approval("bits_per_byte better than deployed", unsure, [report(9.0)])[0]
    assert decide_approval("bits_per_byte not worse than deployed", unsure, [report(9.0)])[0]


@pytest.mark.parametrize("rule", ["", "sometimes", "bits_per_byte", "bits_per_byte < deployed", "a better than b"])
def test_a_rule_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="must be `always`"):
        DeployConfig(when=rule)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"name": "health"}, "path of the server"), ({"name": "smoke-x"}, "runs use names"),
     ({"replicas": 3, "most_replicas": 2}, "at least the first")],
)  # fmt: skip
def test_a_deployment_that_cannot_be_is_refused_before_the_run(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DeployConfig(**wrong)


def evaluated(store: ArtifactStore, fingerprint: str, value: float) -> tuple[Artifact, Artifact]:
    """A model and its evaluation."""
    folder = store.prepare("export", fingerprint, keep_leftovers=False)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    model = store.commit(manifest_of("export", fingerprint, "model"))
    report(value, model=model.reference).write(store.prepare("evaluate", f"{fingerprint}e", keep_leftovers=False))
    made = manifest_of("evaluate", f"{fingerprint}e", "evaluation", inputs={"model": model.reference})
    return model, store.commit(made)


def test_models_are_approved_one_after_the_other(home: Home, tmp_path: Path) -> None:
    store = ArtifactStore(home)
    approved = []
    for fingerprint, value in (("aa", 2.0), ("bb", 2.5), ("cc", 1.9)):
        model, evaluation = evaluated(store, fingerprint, value)
        (tmp_path / fingerprint).mkdir()
        inputs = {"model": model, "evaluation": evaluation}
        context = context_for("deploy", DeployConfig(name="prose"), inputs, tmp_path / fingerprint, home, tmp_path)
        step.run(context)
        found = json.loads((tmp_path / fingerprint / "approval.json").read_text())
        approved.append((found["approved"], store.aliases.all()["prose@approved"]))
    assert approved == [(True, "export/aa"), (False, "export/aa"), (True, "export/cc")]
    assert context.outcome == "approved: eval_bits_per_byte 1.9, deployed 2"


def test_the_control_plane_deploys_what_a_run_has_approved(home: Home, tmp_path: Path) -> None:
    store, deployments = ArtifactStore(home), Deployments(Database(home.database, durable=False))
    evaluated(store, "aa", 2.0)
    store.aliases.set("prose", "approved", "export/aa")
    approval = {"name": "prose", "alias": "prose@approved", "model": "export/aa", "approved": True, "why": "always",
                "options": {"replicas": 2, "most_replicas": 0}}  # fmt: skip
    for fingerprint, changed in (("f1", {}), ("f2", {"approved": False, "name": "other"})):
        folder = store.prepare("deploy", fingerprint, keep_leftovers=False)
        (folder / "approval.json").write_text(json.dumps(approval | changed))
        store.commit(manifest_of("deploy", fingerprint, "approval"))
    log = EventLog(tmp_path / "run" / "events", "runner-1")
    for fingerprint in ("f1", "f2", "unknown"):
        log.append(StepEvent(step="ship", state="succeeded", fingerprint=fingerprint))
    cluster = ManagedCluster(LOCAL, None, 1, lambda: Topology(2, 0, 1))  # type: ignore[arg-type]
    serving = DeploymentRounds(home, deployments, cluster, print)
    deploy = lambda: list(deploy_approved(home, deployments, serving, tmp_path / "run"))  # noqa: E731
    assert deploy() == ["prose"]
    (made,) = deployments.all()
    assert (made.model, made.replicas, made.starting.reference) == ("prose@approved", 2, "export/aa")
    deployments.stop("prose")
    assert deploy() == []  # again, after a crash: what a user has stopped stays so
    assert deployments.get("prose").wanted == "stopped"
