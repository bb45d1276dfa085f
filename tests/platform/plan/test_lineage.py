"""Chains: a repeated run finds its own link, concurrent appends are detected, and no link is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from moray.platform.core.errors import InputError, RecipeError, StepFailed
from moray.platform.core.home import Home
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.fingerprint import EARLIER
from moray.platform.plan.lineage import links
from moray.platform.plan.recipe import PlannedStep, Recipe
from moray.platform.plan.step import Step
from moray.platform.run.runner import Runner, plan_steps
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.manifest import Manifest
from moray.platform.store.sweep import remove_artifact
from tests.platform.run.test_runner import NoRay, Write, WriteConfig


class AppendConfig(StepConfig):
    unit: str = "letters"


class Append(Step[AppendConfig]):
    """What was before, and its input."""

    name: ClassVar[str] = "append"
    Config = AppendConfig
    inputs: ClassVar[dict[str, str]] = {"text": "text"}
    produces: ClassVar[str] = "text"

    def __init__(self, during: Any = None) -> None:
        self._during = during

    def chain(self, config: AppendConfig) -> str:
        return "all"

    def follow(self, config: AppendConfig, earlier: Manifest) -> None:
        if earlier.config["unit"] != config.unit:
            raise RecipeError("another unit")

    def run(self, ctx: StepContext[AppendConfig]) -> None:
        before = ctx.inputs.get(EARLIER)
        text = (before.folder / "out").read_text() if before else ""
        (ctx.folder / "out").write_text(text + (ctx.inputs["text"].folder / "out").read_text())
        if self._during:
            self._during()


def night(text: str, unit: str = "letters", during: Any = None) -> Recipe:
    steps = (
        PlannedStep("write", Write(), WriteConfig(text=text), {}),
        PlannedStep("append", Append(during), AppendConfig(unit=unit), {"text": "write"}),
    )
    return Recipe("night", Path("night.yaml"), steps, "name: night\n")


def run(home: Home, recipe: Recipe) -> tuple[str, bool]:
    """What the chain then says, and whether it was there already."""
    row = Runner(home, NoRay()).run(recipe).steps["append"]
    return (row.artifact.folder / "out").read_text(), row.reused


def test_each_run_continues_from_the_last_and_a_repeated_run_from_the_same(home: Home) -> None:
    assert [run(home, night(text)) for text in "abc"] == [("a", False), ("ab", False), ("abc", False)]
    assert [run(home, night(text)) for text in "bac"] == [("ab", True), ("a", True), ("abc", True)]
    assert run(home, night("d")) == ("abcd", False), "what was repeated did not move the end"
    store = ArtifactStore(home)
    assert [(link.folder / "out").read_text() for link in links(store, "all")] == ["abcd", "abc", "ab", "a"]
    assert [d.reuse for d in plan_steps(night("b"), store)] == [True, True]


def test_a_result_that_was_made_but_not_linked_is_linked_by_a_rerun(home: Home) -> None:
    run(home, night("a"))
    store = ArtifactStore(home)
    first = store.aliases.all()["all@chain"]
    run(home, night("b"))
    step, _, fingerprint = first.partition("/")
    link = store.get(step, fingerprint)
    assert link is not None
    store.aliases.set("all", "chain", link.reference)  # as a kill leaves it, between the manifest and the alias
    assert run(home, night("b")) == ("ab", True)
    assert run(home, night("c")) == ("abc", False)


def test_two_that_went_on_from_the_same_end_cannot_both_be_next(home: Home) -> None:
    run(home, night("a"))
    with pytest.raises(StepFailed, match="another run appended append/") as caught:
        run(home, night("b", during=lambda: run(home, night("c"))))
    assert "run again" in caught.value.hint
    assert run(home, night("b")) == ("acb", False)


def test_a_step_that_cannot_follow_is_rejected_before_anything_starts(home: Home) -> None:
    run(home, night("a"))
    with pytest.raises(RecipeError, match="another unit"):
        plan_steps(night("b", unit="words"), ArtifactStore(home))


def test_a_missing_link_is_named(home: Home) -> None:
    run(home, night("a"))
    run(home, night("b"))
    store = ArtifactStore(home)
    reference = store.aliases.all()["all@chain"]
    remove_artifact(store, reference)
    with pytest.raises(InputError, match=f"'all' is broken: {reference} does not exist") as caught:
        plan_steps(night("c"), store)
    assert caught.value.hint == "start a new chain: moray artifacts unalias all@chain"
