"""The step interface: a name, a version, a config, and `run(ctx)`, which fills a folder.

A recipe refers to steps by name. `builtin.toml` maps names to objects such as `moray.pipelines.dedup.step:step`,
imported only when needed; other distributions add steps through the entry-point group `moray.steps`. A step may be
killed at any time: a rerun starts with an empty folder or, if the step is `resumable`, with its partial output.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from moray.platform.core.cluster import Topology
from moray.platform.core.errors import RecipeError, nearest
from moray.platform.plan.config import ConfigT, StepConfig, local_paths
from moray.platform.plan.context import StepContext
from moray.platform.plan.memory import MemoryRequest, Progress, StepMemoryPlan
from moray.platform.store.submitted import files_below

if TYPE_CHECKING:
    from moray.platform.plan.recipe import PlannedStep, Recipe
    from moray.platform.store.manifest import Manifest

Upload = Callable[[Mapping[str, Path]], str]  # uploads files by key; returns the address of their tree

BUILTIN = Path(__file__).with_name("builtin.toml")


@dataclass(frozen=True)
class ExternalFile:
    """One file outside Moray that a step reads: `key` within `source`, size in bytes, and a digest of its content.

    The digest is the SHA-256, or for an object in a bucket `etag:` and its ETag, which needs no read of the object.
    """

    source: str
    key: str
    size: int
    digest: str


class Step(ABC, Generic[ConfigT]):
    """Base class of steps. Instances are stateless; one object serves every run.

    Increment `version` when the same config and inputs would give a different result. `inputs` maps each input name to
    the kind of artifact it takes (`produces` of the step that makes it); a recipe may omit inputs in `optional`.
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
        """Raises RecipeError for problems detectable before anything starts. `inputs`: input name -> step key."""

    def external(self, config: ConfigT) -> list[ExternalFile]:
        """Returns the files outside Moray that affect the result, sorted; their contents enter the fingerprint."""
        return []

    def submitted(self, config: ConfigT, upload: Upload) -> dict[str, str]:
        """Uploads the files of this machine that the step reads, for hosts that do not have them. Returns the changed
        config fields, such as {"sources.0.path": ...}. By default, every path of the config becomes a reference.
        """
        found = {}
        for name, path in local_paths(config):
            if path.exists():
                found[name] = f"${{store:{upload(files_below(path))}}}"
        return found

    def reads_in_place(self, config: ConfigT) -> frozenset[str]:
        """Returns the inputs that `run` reads in place, by `address`; the others are first copied to this machine."""
        return frozenset()

    def chain(self, config: ConfigT) -> str:
        """Returns the name of the chain whose newest result is this step's input `earlier`; '' for none."""
        return ""

    def follow(self, config: ConfigT, earlier: Manifest) -> None:
        """Raises RecipeError if a result with this config cannot continue from `earlier`."""

    def placement(self, config: ConfigT, topology: Topology) -> str:
        """Describes the resources the step will use, for the plan; empty if there is nothing to choose.

        Raises InputError if the machines cannot run the step. Called before anything starts.
        """
        return ""

    def memory(
        self, planned: PlannedStep, recipe: Recipe, request: MemoryRequest, progress: Progress
    ) -> StepMemoryPlan | None:
        """The memory that a rank of the step would need on a GPU; None for steps without ranks. Starts nothing.

        Raises InputError if the recipe does not tell. progress: is told what is being computed.
        """
        return None

    @abstractmethod
    def run(self, ctx: StepContext[ConfigT]) -> None:
        """Writes the artifact's files to `ctx.folder`. The runner writes the manifest afterwards."""


@functools.cache  # installed packages do not change while a process runs, and the lookup takes 10 ms
def step_names() -> Mapping[str, str]:
    """Returns every known step: name -> `module:object`. Built-in steps override entry points."""
    table = {point.name: point.value for point in importlib.metadata.entry_points(group="moray.steps")}
    return table | tomllib.loads(BUILTIN.read_text())["steps"]


def resolve_step(name: str) -> Step[Any]:
    """Imports the step called `name`. Raises RecipeError that names the nearest known step."""
    table = step_names()
    if name not in table:
        raise RecipeError(f"unknown step {name!r}", nearest(name, table))
    module, _, attribute = table[name].partition(":")
    try:
        step = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plug-in's import may raise anything
        text = f"step {name!r}: {module} cannot be imported: {type(error).__name__}: {error}"
        raise RecipeError(text, f"fix or uninstall the package that provides {name!r}") from error
    if not isinstance(step, Step):
        raise RecipeError(f"step {name!r}: {table[name]} is not a moray.platform.plan.step.Step")
    return step
