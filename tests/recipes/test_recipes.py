"""Every shipped recipe is valid, and every field of it, misspelt or given nonsense, is one error that says where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def shipped() -> Iterator[tuple[Path, Place]]:
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
                yield path, place


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)


def written(raw: Any) -> str:
    return yaml.dump(raw, Dumper=yaml.CSafeDumper, sort_keys=False)


def holder(raw: Any, place: Place) -> Any:
    for part in place[:-1]:
        raw = raw[part]
    return raw


def complaint(raw: Any, path: Path, message: str = "", hint: str = "", either: str = "") -> str:
    """What the error for a recipe does not name: its file and `message` in the message, `hint` in the hint, `either` in
    one of them. '' if it names all."""
    try:
        parse_recipe(written(raw), path)
    except (RecipeError, InputError) as error:
        said = error.message + error.hint
        missing = [
            text
            for text, where in (
                (str(path), error.message),
                (message, error.message),
                (hint, error.hint),
                (either, said),
            )
            if text not in where
        ]
        return f"{error.message} ({error.hint}) names no {missing}" if missing else ""
    return "is accepted"


def offenders(check: Callable[[Any, Path, Place], str]) -> list[str]:
    """The fields of which `check`, given a recipe to change, says something."""
    found = []
    for path, place in shipped():
        if said := check(read(path), path, place):
            found.append(f"{path.stem}:{'.'.join(map(str, place))} {said}")
    return found


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description


def test_a_misspelt_field_is_named() -> None:
    def misspell(raw: Any, path: Path, place: Place) -> str:
        parent, key = holder(raw, place), place[-1]
        renamed = {(f"{name}x" if name == key else name): value for name, value in parent.items()}
        parent.clear()
        parent.update(renamed)
        is_step = len(place) == 2 and place[0] == "steps"
        if is_step and not any(key in (step.get("inputs") or {}).values() for step in raw["steps"].values()):
            raw["steps"][f"{key}x"]["uses"] = key  # a step nobody refers to may have any name
            parse_recipe(written(raw), path)
            return ""
        return complaint(raw, path, either=f"{key}x", hint="" if is_step else str(key))

    assert offenders(misspell) == []


def test_nonsense_for_a_value_is_named() -> None:
    def spoil(raw: Any, path: Path, place: Place) -> str:
        holder(raw, place)[place[-1]] = NONSENSE
        return complaint(raw, path, message=str(place[-1]))

    assert offenders(spoil) == []


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
    assert caught.value.hint == "run `make bench-corpus` to create it"
