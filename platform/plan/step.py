"""What a step is: a name, a version, a config, and `run(ctx)` that fills a folder.

A recipe names steps; `builtin.toml` maps those names to objects such as `moray.pipelines.dedup.step:step`, imported
only when needed, and other distributions add theirs by the entry-point group `moray.steps`. A step may be killed at
any instant: a rerun finds an empty folder, or, where `resumable`, its own leftovers to go on from.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from moray.platform.core.atomic import is_full, write_text
from moray.platform.core.errors import RecipeError, nearest
from moray.platform.core.events import Event, EventLog, MetricEvent, NoteEvent, ProgressEvent
from moray.platform.core.references import found_in, refuse, substitute

if TYPE_CHECKING:
    from moray.platform.core.home import Home
    from moray.platform.store.artifacts import Artifact
    from moray.platform.store.manifest import Manifest

BUILTIN = Path(__file__).with_name("builtin.toml")


class StepConfig(BaseModel):
    """Base of every step's `with:` block: frozen, and unknown fields are errors.

    Operational fields and secrets may be given by reference (platform/core/references.py). Whatever dumps or prints a
    config shows such a field as it was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)  # operational fields that were given by reference

    @field_validator("*", mode="wrap")
    @classmethod
    def _read_references(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if is_operational(cls.model_fields[str(info.field_name)]):
            return handler(substitute(value))
        checked = handler(value)
        refuse(checked)
        return checked

    @model_validator(mode="wrap")
    @classmethod
    def _remember_references(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        config = handler(data)
        if isinstance(data, Mapping):
            names = {field.alias or name: name for name, field in cls.model_fields.items() if is_operational(field)}
            config._written |= {names[key]: value for key, value in data.items() if key in names and found_in(value)}
        return config

    @model_serializer(mode="wrap")
    def _show_references(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown: dict[str, Any] = handler(self)
        return shown | {name: value for name, value in self._written.items() if name in shown}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, self._written.get(str(name), value)) for name, value in super().__repr_args__()]


def operational(default: Any, **rules: Any) -> Any:
    """A config field that says how to run, not what to make (workers, paths): it does not enter the fingerprint."""
    return Field(default, json_schema_extra={"identity": False}, **rules)


def is_operational(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity") is False


ConfigT = TypeVar("ConfigT", bound=StepConfig)


@dataclass(frozen=True)
class ExternalFile:
    """One file outside Moray that a step reads: `key` within `source`, its size, and what stands for its content.

    That is its SHA-256, or for an object in a bucket `etag:` and its ETag: nothing has to be read to know it.
    """

    source: str
    key: str
    size: int
    digest: str


@dataclass(frozen=True)
class Topology:
    """The machines a run may use, as far as a step's `placement` and defaults need to know them."""

    cpus: int
    gpus: int
    memory_bytes: int


class Cluster(ABC):
    """What the runner needs of a place where Ray runs. Implemented in the `cluster` room."""

    logs: Path | None = None  # where Ray's own logs are found after it has stopped
    fixed: ClassVar[bool] = False  # no machine will join, so what no machine can hold now it never can
    on_pending: Callable[[str], None] | None = None  # is told, in words, what Ray cannot place and why
    on_hopeless: Callable[[str], None] | None = None  # the same, of what a fixed cluster can never place

    @abstractmethod
    def ensure(self) -> Topology:
        """Starts Ray if it is not up, connects this process to it, and says what it has."""

    @abstractmethod
    def topology(self) -> Topology:
        """What the cluster has or would have, without starting anything."""

    @abstractmethod
    def stop(self) -> None:
        """Ends everything `ensure` started."""

    def say_pending(self, text: str, hopeless: bool = False) -> None:
        """What a watcher of the cluster calls: the runner shows a warning of the step at work, or ends it."""
        tell = self.on_hopeless if hopeless and self.fixed else self.on_pending
        if tell is not None:
            tell(text)

    @contextlib.contextmanager
    def exclusive(self, name: str, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Holds something that a cluster has only once, against other runs on it. A cluster of one run: nothing.

        Raises Cancelled if `cancelled()` becomes true while waiting.
        """
        yield


class Cancelled(Exception):
    """Raised out of `ctx.checkpoint()` after the user asked the run to stop."""


@dataclass
class StepContext(Generic[ConfigT]):
    """What a running step is given. `counts` and `outcome` end up in the manifest and in the closing table."""

    step: str
    config: ConfigT
    inputs: Mapping[str, Artifact]
    folder: Path
    home: Home
    run: Path
    events: EventLog
    cluster: Cluster
    fingerprint: str
    name: str = ""
    counts: dict[str, float] = field(default_factory=dict)
    outcome: str = ""
    cancel: Callable[[], bool] = lambda: False
    _last: dict[str, float] = field(default_factory=dict)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def progress(self, phase: str, done: float, total: float, unit: str, detail: str = "") -> None:
        """Reports `done` of `total`; at most ten times a second per phase, the last one always."""
        self.check_cancelled()
        now = time.monotonic()
        if done < total and now - self._last.get(phase, 0.0) < 0.1:
            return
        self._last[phase] = now
        self.emit(ProgressEvent(step=self.step, phase=phase, done=done, total=total, unit=unit, detail=detail))

    def metric(self, name: str, value: float, at: int = 0, **labels: str) -> None:
        self.emit(MetricEvent(step=self.step, name=name, value=value, at=at, labels=labels))

    def note(self, text: str, level: str = "info") -> None:
        self.emit(NoteEvent(step=self.step, level="warning" if level == "warning" else "info", text=text))

    def log_path(self, name: str) -> Path:
        """Where this step's log called `name` lies: with the run, so that it outlives a cleaned-up artifact."""
        return self.run / "logs" / f"{self.step}.{name}.txt"

    def write_log(self, name: str, text: str) -> None:
        """Keeps a log with the run; on a full disk it is lost, because the error that it explains matters more."""
        try:
            write_text(self.log_path(name), self.events.redact(text))
        except OSError as error:
            if not is_full(error):
                raise

    def check_cancelled(self) -> None:
        """Raises Cancelled if the run is being stopped; long loops call it."""
        if self.cancel():
            raise Cancelled


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
