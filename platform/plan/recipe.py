"""Reads, checks and resolves a recipe, a DAG of steps in YAML, before anything starts.

    name: quickstart
    steps:
      corpus:  {uses: corpus, with: {sources: [...]}}
      filter:  {inputs: {documents: corpus}, with: {min_words: 20}}

`uses` defaults to the step's own key; `inputs` name other steps. `tracking:` beside `steps:` names programs that show
the curves (tracking.py). Every mistake raises one RecipeError that names the file, the line, the field, the bad value
and the nearest valid one.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError, field_validator

from moray.platform.core import bounded_yaml, references
from moray.platform.core.errors import InputError, RecipeError, nearest
from moray.platform.core.references import REFERENCE, Redactor, redacting, references_in
from moray.platform.plan.config import StepConfig
from moray.platform.plan.step import Step, resolve_step
from moray.platform.plan.tracking import Tracking
from moray.platform.store.search import bring_alias
from moray.platform.store.submitted import bring_tree

references.bring_stored = bring_tree
references.bring_alias = bring_alias
_NAME = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")
_ANY_REFERENCE = re.compile(r"\$\{([^}]*)\}")


class StepSpec(BaseModel):
    """One entry under `steps:`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uses: str = ""
    inputs: dict[str, str] = Field(default_factory=dict)
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")

    @field_validator("inputs", "with_", mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        """Treats an empty `with:` as an empty mapping; YAML reads it as null."""
        return {} if value is None else value


class RecipeSpec(BaseModel):
    """The recipe file as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    tracking: Tracking = Field(default_factory=Tracking)
    steps: dict[str, StepSpec]

    @field_validator("tracking", mode="before")
    @classmethod
    def _no_tracking(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("steps", mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        return {key: {} if step is None else step for key, step in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class PlannedStep:
    """A step of a recipe, resolved: `config` is validated, `inputs` maps input names to step keys."""

    key: str
    step: Step[Any]
    config: StepConfig
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `steps` are in topological order; `source` is the file's text."""

    name: str
    path: Path
    steps: tuple[PlannedStep, ...]
    source: str
    description: str = ""
    tracking: Tracking = field(default_factory=Tracking)


class _Lines:
    """Line numbers of the YAML fields, for error messages."""

    def __init__(self, node: yaml.Node | None) -> None:
        self._lines: dict[tuple[str, ...], int] = {}
        if node is not None:
            self._walk(node, ())

    def _walk(self, node: yaml.Node, path: tuple[str, ...]) -> None:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                at = (*path, str(key.value))
                if at in seen:
                    raise RecipeError(f"line {key.start_mark.line + 1}: {'.'.join(at)} is defined twice", "keep one")
                seen.add(at)
                self._lines[at] = key.start_mark.line + 1
                self._walk(value, at)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._walk(value, (*path, str(i)))

    def of(self, path: Sequence[str]) -> int:
        """The line of `path`, or of its nearest parent that is in the file."""
        for end in range(len(path), -1, -1):
            if tuple(path[:end]) in self._lines:
                return self._lines[tuple(path[:end])]
        return 1


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads `path`, applies `step.field=value` overrides, resolves references, and checks the result.

    Raises RecipeError (the recipe is wrong) or InputError (the file cannot be read).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise InputError(f"recipe {path}: {reason}", "recipes/ contains example recipes") from error
    return parse_recipe(text, path, overrides)


def parse_recipe(text: str, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Like `load_recipe`, from text. Relative paths in the recipe are relative to the current folder."""
    try:
        node, raw = bounded_yaml.compose(text)
        lines = _Lines(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error.message}", error.hint) from error
    except (ValueError, TypeError, OverflowError) as error:  # a number of 5,000 digits, an invalid date
        raise RecipeError(f"{path}: a value cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}:1: a recipe must be a mapping with `name` and `steps`")
    for override in overrides:
        _override(raw, override)
    try:
        spec = RecipeSpec.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, RecipeSpec, path, lines, (), raw) from error
    if not _NAME.match(spec.name):
        raise RecipeError(f"{path}:{lines.of(['name'])}: name {spec.name!r} must match {_NAME.pattern}")
    if not spec.steps:
        raise RecipeError(f"{path}:{lines.of(['steps'])}: steps is empty", "a recipe needs at least one step")
    planned = {key: _plan_step(key, step, spec, path, lines) for key, step in spec.steps.items()}
    order = _order(planned, path, lines)
    return Recipe(spec.name, path, tuple(planned[key] for key in order), text, spec.description, spec.tracking)


def listed_steps(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Returns step key -> (uses, inputs), in file order. Ignores everything else, because the recipe may be from
    another version of Moray. Empty if the text cannot be parsed."""
    try:
        _, raw = bounded_yaml.compose(text)
        return {
            str(key): (str((spec or {}).get("uses") or key), dict((spec or {}).get("inputs") or {}))
            for key, spec in raw["steps"].items()
        }
    except (RecipeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return {}


def _plan_step(key: str, spec: StepSpec, recipe: RecipeSpec, path: Path, lines: _Lines) -> PlannedStep:
    def at(*fields: str) -> str:
        return f"{path}:{lines.of(['steps', key, *fields])}: steps.{'.'.join((key, *fields))}"

    if not _NAME.match(key):
        raise RecipeError(f"{at()}: step names must match {_NAME.pattern}")
    uses = spec.uses or key
    try:
        step = resolve_step(uses)
    except RecipeError as error:
        raise RecipeError(f"{at('uses')}: {error.message}", error.hint) from error
    for name in spec.inputs:
        if name not in step.inputs:
            raise RecipeError(f"{at('inputs', name)}: {uses!r} has no input {name!r}", nearest(name, step.inputs))
    for name in step.inputs:
        if name not in spec.inputs and name not in step.optional:
            raise RecipeError(f"{at('inputs')}: step {uses!r} requires input {name!r}", f"add `{name}: STEP`")
    for name, target in spec.inputs.items():
        if target not in recipe.steps:
            raise RecipeError(f"{at('inputs', name)}: unknown step {target!r}", nearest(target, recipe.steps))
        made = resolve_step(recipe.steps[target].uses or target).produces
        if made != step.inputs[name]:
            raise RecipeError(
                f"{at('inputs', name)}: step {target!r} produces {made}, but {name!r} takes {step.inputs[name]}",
                "use a step that produces " + step.inputs[name],
            )
    values = _substitute(spec.with_, at("with"))
    try:
        config = step.Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, step.Config, path, lines, ("steps", key, "with"), values) from error
    try:
        with redacting(Redactor.of([config])):
            step.check(config, dict(spec.inputs))
    except RecipeError as error:
        raise RecipeError(f"{at('with')}: {error.message}", error.hint) from error
    return PlannedStep(key, step, config, dict(spec.inputs))


def _order(steps: Mapping[str, PlannedStep], path: Path, lines: _Lines) -> list[str]:
    """Topological order that keeps the file's order where possible."""
    sorter = TopologicalSorter({key: sorted(set(step.inputs.values())) for key, step in steps.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        loop = " -> ".join(reversed(error.args[1]))
        line = lines.of(["steps", error.args[1][0], "inputs"])
        raise RecipeError(f"{path}:{line}: steps form a cycle: {loop}", "remove one of these inputs") from error
    position = {key: i for i, key in enumerate(steps)}
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=position.__getitem__)
        order += ready
        sorter.done(*ready)
    return order


def _override(raw: dict[str, Any], text: str) -> None:
    """Applies one `step.field[.field...]=value` or `tracking.field=value` to the parsed file; the value is YAML."""
    target, equals, value = text.partition("=")
    parts = target.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise RecipeError(f"--set {text!r}: expected STEP.FIELD=VALUE", "for example --set pretrain.steps=50")
    steps = raw.get("steps") or {}
    if not isinstance(steps, dict):
        return  # validation reports the wrong type later
    is_tracking = parts[0] == "tracking" and "tracking" not in steps
    if parts[0] not in steps and not is_tracking:
        raise RecipeError(f"--set {text!r}: unknown step {parts[0]!r}", nearest(parts[0], [*steps, "tracking"]))
    try:
        _, parsed = bounded_yaml.compose(value)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML") from error
    except RecipeError as error:
        raise RecipeError(f"--set {text!r}: {error.message}", error.hint) from error
    if is_tracking:
        raw["tracking"] = {} if raw.get("tracking") is None else raw["tracking"]
        _put(raw["tracking"], parts[1:], parsed, text)
        return
    step = steps[parts[0]] = steps[parts[0]] if isinstance(steps[parts[0]], dict) else {}
    step["with"] = {} if step.get("with") is None else step["with"]
    _put(step["with"], parts[1:], parsed, text)


def _put(node: Any, parts: Sequence[str], value: Any, text: str) -> None:
    """Sets `value` at a path within a mapping or a list, creating missing mappings."""
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise RecipeError(f"--set {text!r}: {part!r} is not a field of a mapping")
    last = parts[-1]
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"--set {text!r}: {last!r} is not a field of a mapping")


def _substitute(value: Any, where: str) -> Any:
    """Replaces `${python:stdlib}` and `${python:site-packages}` in every string.

    `${env:NAME}` and `${file:PATH}` are left unchanged; the config's fields resolve or reject them.
    """
    if isinstance(value, dict):
        return {key: _substitute(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, str):
        return _ANY_REFERENCE.sub(lambda match: _reference(match.group(1), where), value)
    return value


def _reference(text: str, where: str) -> str:
    folders = {"python:stdlib": "stdlib", "python:site-packages": "purelib"}
    if text in folders:
        return sysconfig.get_paths()[folders[text]]
    if REFERENCE.fullmatch(f"${{{text}}}"):
        return f"${{{text}}}"
    raise RecipeError(f"{where}: unknown reference ${{{text}}}", nearest(text, [*folders, "env:NAME", "file:PATH"]))


def _explain(
    error: ValidationError, model: type[BaseModel], path: Path, lines: _Lines, prefix: tuple[str, ...], written: Any
) -> RecipeError:
    """Converts pydantic's first error to one line, with the nearest valid field for an unknown one.

    `written` is the validated data as in the recipe. Where it holds a reference, the message shows the reference, not
    the value that pydantic saw.
    """
    # A misspelled field may also be reported as missing; report the misspelling.
    first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    location, _ = _walk(model, first["loc"])
    fields = tuple(map(str, location))
    full = (*prefix, *fields)
    where = f"{path}:{lines.of(full)}: {'.'.join(full)}"
    if first["type"] == "extra_forbidden":
        _, models = _walk(model, first["loc"][:-1])
        for one in models.values():
            if issubclass(one, StepConfig) and fields[-1] in one.moved:
                return RecipeError(f"{where}: unknown field", f"write it as {one.moved[fields[-1]]}")
        known = [name for one in models.values() for name in _named(one)]
        return RecipeError(f"{where}: unknown field", nearest(fields[-1], known))
    if "hint" in (context := first.get("ctx", {})):  # raised by Moray's own validators
        return RecipeError(f"{where}: {context['message']}", context["hint"])
    given = _at(written, location)
    shown = "" if first["type"] == "missing" else f" (got {given if references_in(given) else first['input']!r:.80})"
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"{where}: {message[0].lower() + message[1:]}{shown}")


def _at(written: Any, path: Sequence[str | int]) -> Any:
    """The value at `path`, or at its nearest parent that is in the data."""
    for part in path:
        try:
            written = written[part]
        except (KeyError, IndexError, TypeError):  # an absent field
            break
    return written


def _walk(model: type[BaseModel], path: Sequence[str | int]) -> tuple[list[str | int], dict[str, type[BaseModel]]]:
    """Returns the path as written in YAML, and the models that are possible at its end.

    For unions, pydantic's error paths also contain the tag or class name of a member, which is not in the YAML.
    """
    written: list[str | int] = []
    models = {model.__name__: model}
    for part in path:
        if str(part) in models:
            models = {str(part): models[str(part)]}
            continue
        written.append(part)
        fields = [field for one in models.values() for name, field in _named(one).items() if name == part]
        inner = {name: one for field in fields for name, one in _models_in(field.annotation).items()}
        models = inner or ({} if fields else models)
    return written, models


def _named(model: type[BaseModel]) -> dict[str, Any]:
    """The model's fields by their YAML name."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models_in(annotation: Any, tag: str = "") -> dict[str, type[BaseModel]]:
    """The model classes inside `list[M]`, `dict[str, M]`, `M | None`, ..., keyed by tag or class name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {tag or annotation.__name__: annotation}
    for item in getattr(annotation, "__metadata__", ()):
        tag = item.tag if isinstance(item, Tag) else tag
    arguments = getattr(annotation, "__args__", ())
    return {name: model for argument in arguments for name, model in _models_in(argument, tag).items()}
