"""Recipes: what is accepted, and that every mistake is one error naming file, line, field, value and fix."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from moray.platform.core.errors import InputError, MorayError, RecipeError
from moray.platform.plan.recipe import listed_steps, load_recipe, parse_recipe
from moray.platform.plan.step import resolve_step, step_names

DATA = """
    name: demo
    steps:
      corpus:
        with:
          sources:
            - {name: here, path: %s, include: ["*.txt"]}
      filter:
        inputs: {documents: corpus}
        with: {min_words: 3}
      again:
        uses: filter
        inputs: {documents: filter}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some words to read")
    return tmp_path


def parse(text: str, folder: Path, overrides: tuple[str, ...] = ()) -> object:
    filled = text % folder if "%s" in text else text
    return parse_recipe(textwrap.dedent(filled), Path("demo.yaml"), overrides)


def mistake(text: str, folder: Path, overrides: tuple[str, ...] = ()) -> MorayError:
    with pytest.raises((RecipeError, InputError)) as caught:
        parse(text, folder, overrides)
    return caught.value


def test_steps_come_in_an_order_in_which_they_can_run(folder: Path) -> None:
    recipe = parse(DATA, folder)
    assert [step.key for step in recipe.steps] == ["corpus", "filter", "again"]
    assert recipe.steps[1].config.min_words == 3
    assert recipe.steps[2].step.name == "filter"
    assert recipe.steps[2].inputs == {"documents": "filter"}


def test_set_overrides_a_field_and_reaches_into_lists(folder: Path) -> None:
    recipe = parse(DATA, folder, ("filter.min_words=7", "corpus.sources.0.license=MIT"))
    assert recipe.steps[1].config.min_words == 7
    assert recipe.steps[0].config.sources[0].license == "MIT"


@pytest.mark.parametrize(
    ("old", "new", "where", "fix"),
    [
        ("min_words: 3", "min_wrods: 3", "demo.yaml:10: steps.filter.with.min_wrods: unknown field", "'min_words'"),
        ("min_words: 3", "min_words: many", "demo.yaml:10: steps.filter.with.min_words", ""),
        ("min_words: 3", "min_words: -1", "(got -1)", ""),
        ("uses: filter", "uses: fliter", "demo.yaml:12: steps.again.uses: unknown step 'fliter'", "'filter'"),
        ("documents: corpus", "documents: corpse", "unknown step 'corpse'", "'corpus'"),
        ("documents: corpus", "document: corpus", "'filter' has no input 'document'", "'documents'"),
        ("inputs: {documents: corpus}", "inputs: {}", "requires input 'documents'", "add `documents: STEP`"),
        ("documents: corpus", "documents: again", "steps form a cycle", "remove"),
        ("include:", "inclde:", "unknown field", "'include'"),
        ('"*.txt"', '"*.xyz"', "no file matches", "include"),
        ("path: %s", "path: /nowhere/at/all", "does not exist", "path"),
        ("path: %s", "path: '${env:MORAY_NOT_SET}'", "MORAY_NOT_SET is not set", "export"),
        ("path: %s", "path: '${python:stdlb}'", "unknown reference", "'python:stdlib'"),
        ("name: demo", "name: Demo Recipe", "demo.yaml:2: name", ""),
        ("steps:", "stesp:", "unknown field", "'steps'"),
        ("uses: filter", "uses: filter\n        uses: dedup", "is defined twice", "keep one"),
        ("name: demo", "name: [demo", "not valid YAML", ""),
    ],
)
def test_a_mistake_names_its_place_and_its_fix(folder: Path, old: str, new: str, where: str, fix: str) -> None:
    assert old in DATA
    error = mistake(DATA.replace(old, new, 1), folder)
    assert where in error.message
    assert fix in error.hint
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("filter.min_wrods=3", "unknown field"),
        ("fliter.min_words=3", "unknown step 'fliter'"),
        ("min_words=3", "expected STEP.FIELD=VALUE"),
        ("filter.min_words", "expected STEP.FIELD=VALUE"),
        ("filter.min_words=[1", "not valid YAML"),
        ("filter.min_words.deep=1", "is not a field of a mapping"),
    ],
)
def test_a_bad_override_is_named(folder: Path, override: str, where: str) -> None:
    assert where in mistake(DATA, folder, (override,)).message


def test_an_input_must_be_of_the_kind_the_step_takes(folder: Path) -> None:
    text = DATA + "      tokenizer:\n        inputs: {documents: filter}\n"
    assert "produces documents, but 'documents' takes split-documents" in mistake(text, folder).message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml: No such file"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]"])
def test_a_recipe_that_is_not_a_mapping_is_rejected(text: str, folder: Path) -> None:
    assert "a recipe must be a mapping" in mistake(text, folder).message


def test_no_step_takes_a_negative_seed() -> None:
    seeds = {name: field for name in step_names() if (field := resolve_step(name).Config.model_fields.get("seed"))}
    assert {"dedup", "pretrain", "evaluate", "quality-model", "synthesize"} <= set(seeds)
    for name, field in seeds.items():
        assert any(getattr(one, "ge", None) == 0 for one in field.metadata), name


def test_steps_are_listed_of_a_recipe_that_another_version_took() -> None:
    text = "kind: old\nsteps:\n  words: {uses: gone, inputs: {documents: corpus}, when: never}\n  corpus:\n"
    assert listed_steps(text) == {"words": ("gone", {"documents": "corpus"}), "corpus": ("corpus", {})}
    assert list(listed_steps(text)) == ["words", "corpus"]


@pytest.mark.parametrize(
    "text", ["", "steps: [1]", "steps:", "a: [", "steps: {a: 1}", "12", "steps: &a {b: *a}", "steps: " + "[" * 100]
)
def test_a_recipe_that_cannot_be_read_has_no_steps(text: str) -> None:
    assert listed_steps(text) == {}
