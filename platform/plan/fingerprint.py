"""The content address of a step's result, known before the step runs.

SHA-256 over step name, step version, the identity fields of the config, the inputs' fingerprints, and every external
file by (source, key, size, content hash). File locations, worker counts and the names of outputs are excluded, so the
same work on the same bytes has the same address on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from moray.platform.core.references import Secret
from moray.platform.plan.config import is_added, is_operational, is_section
from moray.platform.plan.recipe import PlannedStep, Recipe
from moray.platform.plan.step import ExternalFile

EARLIER = "earlier"  # the input for a step that continues from its own earlier result (platform/plan/lineage.py)


def identity(value: Any) -> Any:
    """Converts a config to plain JSON data, without operational fields, at any depth. Sections are dissolved."""
    if isinstance(value, BaseModel):
        plain: dict[str, Any] = {}
        for name, field in type(value).model_fields.items():
            if is_section(field):
                plain |= identity(getattr(value, name))
            elif not (is_operational(field) or (is_added(field) and getattr(value, name) == field.default)):
                plain[name] = identity(getattr(value, name))
        return plain
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if isinstance(value, Path | Secret):
        return str(value)  # a secret's text is its reference
    return value


def hash_external(files: Sequence[ExternalFile]) -> str:
    """Hashes a list of external files, independent of their order."""
    digest = hashlib.sha256()
    for file in sorted(files, key=astuple):
        digest.update(json.dumps(astuple(file)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class External:
    """Hash, number and size of the external files of one source when the address was computed."""

    sha256: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Address:
    """The inputs of a fingerprint; kept in the manifest so that a change can be explained."""

    step: str
    version: int
    config: Any
    inputs: Mapping[str, str]
    external: Mapping[str, External]

    @property
    def fingerprint(self) -> str:
        """32 hex characters (128 bits)."""
        external = {source: found.sha256 for source, found in self.external.items()}
        parts = [self.step, self.version, self.config, dict(self.inputs), external]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def address(planned: PlannedStep, inputs: Mapping[str, str]) -> Address:
    """Returns the address of one step, given its inputs' fingerprints. Hashes the external files."""
    by_source: dict[str, list[ExternalFile]] = {}
    for file in planned.step.external(planned.config):
        by_source.setdefault(file.source, []).append(file)
    return Address(
        step=planned.step.name,
        version=planned.step.version,
        config=identity(planned.config),
        inputs=dict(inputs),
        external={
            source: External(hash_external(files), len(files), sum(file.size for file in files))
            for source, files in sorted(by_source.items())
        },
    )


# (step, fingerprints of its inputs) -> fingerprint of the earlier result that it continues from, if any.
FindEarlier = Callable[[PlannedStep, Mapping[str, str]], str | None]


def addresses(recipe: Recipe, find_earlier: FindEarlier = lambda planned, inputs: None) -> dict[str, Address]:
    """Returns the address of every step of `recipe`, by step key."""
    found: dict[str, Address] = {}
    for planned in recipe.steps:
        inputs = {name: found[target].fingerprint for name, target in planned.inputs.items()}
        earlier = find_earlier(planned, inputs)
        found[planned.key] = address(planned, inputs | ({EARLIER: earlier} if earlier else {}))
    return found
