"""Values of references are used but never written: not to disk, not in a plan, not in an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import InputError, RecipeError, StepFailed
from moray.platform.core.events import Event
from moray.platform.core.home import Home
from moray.platform.core.references import SHORTEST, Redactor, Secret
from moray.platform.plan.config import StepConfig, operational
from moray.platform.plan.context import StepContext
from moray.platform.plan.fingerprint import identity
from moray.platform.plan.recipe import PlannedStep, Recipe, parse_recipe
from moray.platform.plan.step import Step
from moray.platform.run.runner import Runner, plan_steps
from moray.platform.store.artifacts import ArtifactStore

TOKEN = 'hunter2-"quoted"\\and\nmore'
FOLDER = "/data/of/somebody"


class Login(StepConfig):
    token: Secret
    user: str = ""


class FetchConfig(StepConfig):
    login: Login
    path: Path | None = operational(None)
    mirrors: tuple[str, ...] = operational(())
    workers: int = operational(1)
    text: str = ""


class Fetch(Step[FetchConfig]):
    """Uses its secret, and lets a test misuse it."""

    name: ClassVar[str] = "fetch"
    Config = FetchConfig
    produces: ClassVar[str] = "text"

    def __init__(self, misuse: Callable[[StepContext[FetchConfig]], None] = lambda ctx: None) -> None:
        self._misuse = misuse

    def run(self, ctx: StepContext[FetchConfig]) -> None:
        assert ctx.config.login.token.reveal() == TOKEN
        assert str(ctx.config.path) == f"{FOLDER}/text"
        (ctx.folder / "config.json").write_text(ctx.config.model_dump_json())
        (ctx.folder / "config.txt").write_text(f"{ctx.config} {ctx.config!r} {ctx.config.login.token}")
        self._misuse(ctx)


class NoRay(Cluster):
    def ensure(self) -> Topology:
        raise AssertionError("no step here needs Ray")

    def topology(self) -> Topology:
        return Topology(cpus=1, gpus=0, memory_bytes=1 << 30)

    def stop(self) -> None:
        pass


WRITTEN = {
    "login": {"token": "${env:MORAY_TEST_TOKEN}"},
    "path": "${env:MORAY_TEST_FOLDER}/text",
    "mirrors": ["${env:MORAY_TEST_FOLDER}", "plain"],
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_TEST_TOKEN", TOKEN)
    monkeypatch.setenv("MORAY_TEST_FOLDER", FOLDER)


def recipe(misuse: Callable[[StepContext[Any]], None] = lambda ctx: None) -> Recipe:
    planned = PlannedStep("fetch", Fetch(misuse), FetchConfig.model_validate(WRITTEN), {})
    return Recipe("secret", Path("secret.yaml"), (planned,), "name: secret\n")


def leaks(home: Home) -> list[Path]:
    """Files under MORAY_HOME in which a value stands, however it is escaped."""
    return [
        path
        for path in home.root.rglob("*")
        if path.is_file() and (b"hunter2" in path.read_bytes() or FOLDER.encode() in path.read_bytes())
    ]


def test_a_run_writes_the_reference_and_never_the_value(home: Home) -> None:
    def talk(ctx: StepContext[Any]) -> None:
        value = ctx.config.login.token.reveal()
        ctx.note(f"logged in with {value}")
        ctx.progress("fetching", 1, 2, "files", detail=f"{value!r}")
        ctx.metric("train_loss", 1.0, source=value)
        ctx.write_log("traffic", f"GET {ctx.config.path}?token={value}")
        ctx.outcome = f"read {ctx.config.path} with {value}"

    seen: list[Event] = []
    result = Runner(home, NoRay(), [seen.append]).run(recipe(talk))
    manifest = result.steps["fetch"].artifact.manifest
    assert manifest.config["login"]["token"] == "${env:MORAY_TEST_TOKEN}"
    assert manifest.config["path"] == "${env:MORAY_TEST_FOLDER}/text"
    assert manifest.config["mirrors"] == ["${env:MORAY_TEST_FOLDER}", "plain"]
    assert manifest.address["config"]["login"]["token"] == "${env:MORAY_TEST_TOKEN}"
    assert manifest.outcome == "read ${env:MORAY_TEST_FOLDER}/text with ${env:MORAY_TEST_TOKEN}"
    assert not leaks(home)
    assert not [event for event in seen if "hunter2" in str(event)], "what the terminal is shown"


@pytest.mark.parametrize("kind", [RuntimeError, InputError])
def test_a_failing_step_does_not_quote_the_value(home: Home, kind: type[Exception]) -> None:
    def burst(ctx: StepContext[Any]) -> None:
        raise kind(f"401 for {ctx.config.login.token.reveal()} at {ctx.config.path}")

    with pytest.raises((StepFailed, InputError)) as caught:
        Runner(home, NoRay()).run(recipe(burst))
    assert "${env:MORAY_TEST_FOLDER}/text" in str(caught.value)
    assert "hunter2" not in caught.value.message + caught.value.hint + str(caught.value)
    assert not leaks(home)


def test_another_value_is_the_same_work_and_another_reference_is_not(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    Runner(home, NoRay()).run(recipe())
    monkeypatch.setenv("MORAY_TEST_TOKEN", "another password")
    assert [decision.reuse for decision in plan_steps(recipe(), ArtifactStore(home))] == [True]
    monkeypatch.setenv("OTHER_TOKEN", "another password")
    config = FetchConfig.model_validate({**WRITTEN, "login": {"token": "${env:OTHER_TOKEN}"}})
    changed = Recipe("secret", Path("s"), (PlannedStep("fetch", Fetch(), config, {}),), "")
    (decision,) = plan_steps(changed, ArtifactStore(home))
    assert decision.why == "login.token: '${env:MORAY_TEST_TOKEN}' -> '${env:OTHER_TOKEN}'"


def test_a_file_holds_a_value(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from a file\n")
    secret = Login.model_validate({"token": f"${{file:{tmp_path}/token}}"}).token
    assert secret.reveal() == "from a file"
    assert str(secret) == f"${{file:{tmp_path}/token}}"
    assert pickle.loads(pickle.dumps(secret)).reveal() == "from a file", "it travels to workers"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("hunter2 in plain", "must be a reference, not plain text"),
        ("${env:MORAY_TEST_TOKEN} and more", "must be a reference, not plain text"),
        (7, "must be a reference, not plain text"),
        ("${env:MORAY_NOT_SET}", "environment variable MORAY_NOT_SET is not set"),
        ("${file:/nowhere/at/all}", "No such file"),
        ("${env:MORAY_TEST_SHORT}", "too short for a secret"),
    ],
)
def test_an_invalid_secret_is_rejected(written: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_TEST_SHORT", "x" * (SHORTEST - 1))
    with pytest.raises(ValidationError, match=message):
        Login.model_validate({"token": written})


TEXT = """
name: demo
steps:
  corpus:
    with:
      sources: [{name: here, path: %s, license: %s, max_files: %s}]
"""


@pytest.mark.parametrize(
    ("path", "license_", "files", "message"),
    [
        ("${env:MORAY_TEST_FOLDER}", "x", "1", "${env:MORAY_TEST_FOLDER} does not exist"),
        ("${file:/nowhere/at/all}", "x", "1", "sources.0.path: ${file:/nowhere/at/all}: No such file"),
        ("/tmp", "${env:MORAY_TEST_FOLDER}", "1", "sources.0.license: ${env:MORAY_TEST_FOLDER} is not allowed here"),
        ("/tmp", "x", "${env:MORAY_TEST_FOLDER}", "(got '${env:MORAY_TEST_FOLDER}')"),
    ],
)
def test_a_recipes_mistakes_show_references(path: str, license_: str, files: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TEXT % tuple(f"'{text}'" for text in (path, license_, files)), Path("demo.yaml"))
    assert message in caught.value.message
    assert caught.value.message.startswith("demo.yaml:")
    assert FOLDER not in caught.value.message + caught.value.hint


def test_a_bad_value_of_an_operational_field_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_TEST_WORKERS", "hunter2")
    settings = "{steps: 1, parallel: {workers: '%s'}}"
    text = f"name: demo\nsteps: {{pretrain: {{inputs: {{tokens: tokenize}}, with: {settings}}}, tokenize: {{}}}}"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text % "${env:MORAY_TEST_WORKERS}", Path("demo.yaml"))
    assert "hunter2" not in caught.value.message + caught.value.hint


def test_operational_fields_take_values_and_configs_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_TEST_WORKERS", "4")
    config = FetchConfig.model_validate({**WRITTEN, "workers": "${env:MORAY_TEST_WORKERS}"})
    assert config.workers == 4
    assert config.mirrors == (FOLDER, "plain")
    again = FetchConfig.model_validate(config.model_dump())
    assert again == config
    assert pickle.loads(pickle.dumps(config)).model_dump() == config.model_dump()
    assert identity(config) == {
        "login": {"token": "${env:MORAY_TEST_TOKEN}", "user": ""},
        "text": "",
    }


def test_the_longest_value_is_redacted_first_and_short_ones_are_left() -> None:
    redact = Redactor({"secret": "${env:A}", "secrets": "${env:B}", "a": "${env:C}"})
    assert redact("a secret of secrets") == "a ${env:A} of ${env:B}"
    assert Redactor()("as it is") == "as it is"


def test_models_of_others_pass_through() -> None:
    class Plain(BaseModel):
        value: int = 1

    assert Redactor.of([Plain()])("text") == "text"
