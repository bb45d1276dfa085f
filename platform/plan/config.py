"""A step's `with:` block: `StepConfig`, and operational fields, which are not part of the fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

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

from moray.platform.core.references import references_in, refuse, substitute

ON_HOSTS = "host:"  # begins a path that all hosts have


class StepConfig(BaseModel):
    """Base of every step's `with:` block: frozen, and unknown fields are errors.

    Operational fields and secrets may be given by reference (platform/core/references.py). A dumped or printed config
    shows such a field as written in the recipe. `moved`: the new places of fields that recipes for older versions of
    Moray have, for the error's hint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    moved: ClassVar[Mapping[str, str]] = {}
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
            config._written |= {
                names[key]: value for key, value in data.items() if key in names and references_in(value)
            }
        return config

    @model_serializer(mode="wrap")
    def _show_references(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown: dict[str, Any] = handler(self)
        return shown | {name: value for name, value in self._written.items() if name in shown}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, self._written.get(str(name), value)) for name, value in super().__repr_args__()]


ConfigT = TypeVar("ConfigT", bound=StepConfig)


def operational(default: Any, **rules: Any) -> Any:
    """A config field that affects how a step runs, not its result (workers, paths); excluded from the fingerprint."""
    return Field(default, json_schema_extra={"identity": False}, **rules)


def added(default: Any, **rules: Any) -> Any:
    """A config field that a step got later. The fingerprint has it only if it is not the default, so that earlier
    results are still found."""
    return Field(default, json_schema_extra={"added": True}, **rules)


def section(kind: type[ConfigT]) -> Any:
    """A config field that groups other fields by topic. The fingerprint has them as fields of the config itself, so
    moving a field into a section changes no fingerprint."""
    return Field(default_factory=kind, json_schema_extra={"section": True})


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("section") is True


def is_added(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("added") is True


def is_operational(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity") is False


def local_paths(config: Any, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yields (field, path) for every path of this machine in a config, at any depth. `host:` paths are those of the
    cluster's hosts."""
    if isinstance(config, Path):
        if not str(config).startswith(ON_HOSTS):
            yield prefix.removesuffix("."), config.expanduser().absolute()
    elif isinstance(config, BaseModel):
        for name, field in type(config).model_fields.items():
            yield from local_paths(getattr(config, name), f"{prefix}{field.alias or name}.")
    elif isinstance(config, list | tuple):
        for number, item in enumerate(config):
            yield from local_paths(item, f"{prefix}{number}.")
    elif isinstance(config, Mapping):
        for name, item in config.items():
            yield from local_paths(item, f"{prefix}{name}.")


def user_path(path: Path) -> Path:
    """A path of a recipe as a path on this host: without `host:`, which says that all hosts have it."""
    return Path(str(path).removeprefix(ON_HOSTS)).expanduser()
