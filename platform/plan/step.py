"""What a step is: a name, a version, a config, and `run(ctx)` that fills a folder.

A recipe names steps; `builtin.toml` maps those names to objects such as `moray.pipelines.dedup.step:step`, imported
only when needed, and other distributions add theirs by the entry-point group `moray.steps`. A step may be killed at
any instant: a rerun finds an empty folder, or, where `resumable`, its own leftovers to go on from.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from moray.platform.core.cluster import Topology
from moray.platform.core.errors import RecipeError, nearest
from moray.platform.plan.config import ConfigT, StepConfig
from moray.platform.plan.context import StepContext

if TYPE_CHECKING:
    from moray.platform.store.manifest import Manifest

BUILTIN = Path(__file__).with_name("builtin.toml")


@dataclass(frozen=True)
class ExternalFile:
    """One file outside Moray that a step reads: `key` within `source`, its size, and what stands for its content.

    That is its SHA-256, or for an object in a bucket `etag:` and its ETag: nothing has to be read to know it.
    """

    source: str
    key: str
    size: int
    digest: str


class Step(ABC, Generic[ConfigT]):
    """A kind of work a recipe can name. Instances hold no state; one object serves every run.

    `version` is raised when the same config and inputs would give a different result. `inputs` maps the input names
    a recipe must give to the kind of artifact (`produces` of the step there) each takes; those in `optional` it may
    leave out.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Config: ClassVar[type[StepConfig]]
    inputs: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()
    produces: ClassVar[str]
    resumable: ClassVar[bool] = False
    needs_ray: ClassVar[bool] = False

    def check(self, config: ConfigT, inputs: Mapping[str, str]) -> None:
        """Raises RecipeError for what can be known to fail before anything starts. `inputs`: name -> fingerprint."""

    def external(self, config: ConfigT) -> list[ExternalFile]:
        """The files outside Moray that decide the result, sorted; they enter the fingerprint by content."""
        return []

    def reads_in_place(self, config: ConfigT) -> frozenset[str]:
        """The inputs that `run` reads by `address`, wherever they lie; the others are brought here first."""
        return frozenset()

    def chain(self, config: ConfigT) -> str:
        """The name of the chain whose newest result this one goes on from, as its input `earlier`; '' for none."""
        return ""

    def follow(self, config: ConfigT, earlier: Manifest) -> None:
        """Raises RecipeError if a result with this config cannot go on from `earlier`."""

    def placement(self, config: ConfigT, topology: Topology) -> str:
        """What the step will run on, in words, for the plan; empty where there is nothing to choose.

        Raises InputError where the machines cannot run it. Called before anything starts.
        """
        return ""

    @abstractmethod
    def run(self, ctx: StepContext[ConfigT]) -> None:
        """Writes the artifact's files into `ctx.folder`. The runner writes the manifest afterwards."""


@functools.cache  # what is installed does not change while a process runs, and looking takes 10 ms
def step_names() -> Mapping[str, str]:
    """Every known step: name -> `module:object`. Built-in names win over entry points."""
    table = {point.name: point.value for point in importlib.metadata.entry_points(group="moray.steps")}
    return table | tomllib.loads(BUILTIN.read_text())["steps"]


def resolve_step(name: str) -> Step[Any]:
    """Imports the step called `name`. Raises RecipeError naming the nearest known one."""
    table = step_names()
    if name not in table:
        raise RecipeError(f"unknown step {name!r}", nearest(name, table))
    module, _, attribute = table[name].partition(":")
    try:
        step = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plug-in's import may raise anything
        text = f"step {name!r}: {module} cannot be imported: {type(error).__name__}: {error}"
        raise RecipeError(text, f"mend it, or uninstall the package that brings {name!r}") from error
    if not isinstance(step, Step):
        raise RecipeError(f"step {name!r}: {table[name]} is not a moray.platform.plan.step.Step")
    return step
