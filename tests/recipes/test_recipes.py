"""Every shipped recipe is valid, and every field of it, misspelt or given nonsense, is one error that says where."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from moray.platform.api import RECIPES
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.plan.recipe import load_recipe, parse_recipe

NONSENSE = {"not": ["this"]}
Place = tuple[str | int, ...]

pytestmark = pytest.mark.usefixtures("built_corpus")


def fields(node: Any, at: Place = ()) -> Iterator[Place]:
    """The place of every key of every mapping, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*at, key)
            yield from fields(value, (*at, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from fields(value, (*at, i))


def shipped() -> Iterator[Any]:
    """Every field of every recipe, but those of a kind of step, or of one list, that were there before."""
    seen = set()
    for path in sorted(RECIPES.glob("*.yaml")):
        raw = read(path)
        for place in fields(raw):
            kind: Place = place
            if len(place) > 2:
                kind = (raw["steps"][place[1]].get("uses", place[1]), *place[2:])
            kind = tuple("*" if isinstance(part, int) else part for part in kind)
            if kind not in seen:
                seen.add(kind)
                yield pytest.param(path, place, id=f"{path.stem}:{'.'.join(map(str, place))}")


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)


def written(raw: Any) -> str:
    return yaml.dump(raw, Dumper=yaml.CSafeDumper, sort_keys=False)


def holder(raw: Any, place: Place) -> Any:
    for part in place[:-1]:
        raw = raw[part]
    return raw


def error_of(raw: Any, path: Path) -> RecipeError | InputError:
    with pytest.raises((RecipeError, InputError)) as caught:
        parse_recipe(written(raw), path)
    return caught.value


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description


@pytest.mark.parametrize(("path", "place"), shipped())
def test_a_misspelt_field_is_named(path: Path, place: Place) -> None:
    raw = read(path)
    parent, key = holder(raw, place), place[-1]
    renamed = {(f"{name}x" if name == key else name): value for name, value in parent.items()}
    parent.clear()
    parent.update(renamed)
    is_step = len(place) == 2 and place[0] == "steps"
    if is_step and not any(key in (step.get("inputs") or {}).values() for step in raw["steps"].values()):
        raw["steps"][f"{key}x"]["uses"] = key  # a step nobody refers to may have any name
        parse_recipe(written(raw), path)
        return
    error = error_of(raw, path)
    assert f"{key}x" in error.message + error.hint
    assert str(path) in error.message
    if not is_step:
        assert str(key) in error.hint


@pytest.mark.parametrize(("path", "place"), shipped())
def test_nonsense_for_a_value_is_named(path: Path, place: Place) -> None:
    raw = read(path)
    holder(raw, place)[place[-1]] = NONSENSE
    error = error_of(raw, path)
    assert str(path) in error.message
    assert str(place[-1]) in error.message


def test_the_demo_reads_every_source_of_the_built_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES.parent / "benchmarks" / "corpus"))
    from sources import SOURCES

    listed = read(RECIPES / "corpus-demo.yaml")["steps"]["corpus"]["with"]["sources"]
    shards = {source.name: f"documents-{source.name}-000.parquet" for source in SOURCES}
    found = {item["name"]: [n for n, shard in shards.items() if fnmatch(shard, item["include"][0])] for item in listed}
    assert found == {name: [name] for name in shards}


def test_without_the_corpus_the_demo_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=r"elsewhere/benchmarks/corpus/\.cache/documents does not exist") as caught:
        load_recipe(RECIPES / "corpus-demo.yaml")
    assert caught.value.hint == "`make bench-corpus` makes it"
