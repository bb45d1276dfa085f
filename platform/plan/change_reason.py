"""Explains why a step runs: the differences from the newest earlier artifact of the same step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moray.platform.core.differences import differences
from moray.platform.plan.code_hash import source_hash
from moray.platform.plan.fingerprint import Address
from moray.platform.plan.step import Step
from moray.platform.store.artifacts import Artifact

_SHOWN = 4


def explain_change(address: Address, newest: Artifact | None) -> str:
    """Returns the reason why no artifact exists at `address`: the differences from the newest one of the same step."""
    if newest is None:
        return "never run"
    old = newest.manifest.address
    if old["version"] != address.version:
        return f"step version {old['version']} -> {address.version}"
    found = [f"input {name} changed" for name, value in address.inputs.items() if old["inputs"].get(name) != value]
    found += _external(old["external"], address)
    found += [str(difference) for difference in differences(old["config"], address.config)]
    return "; ".join(found[:_SHOWN]) or "its artifact was removed"


def _external(old: Mapping[str, Any], address: Address) -> Iterator[str]:
    """Yields `source NAME ...` for every source with changed files."""
    for source in sorted(old.keys() | address.external.keys()):
        before, now = old.get(source), address.external.get(source)
        if before is None:
            yield f"source {source} is new"
        elif now is None:
            yield f"source {source} was removed"
        elif before["sha256"] != now.sha256:
            sizes = f"{before['files']:,} -> {now.files:,} files, {before['bytes']:,} -> {now.bytes:,} bytes"
            yield f"source {source} changed ({sizes})"


def is_current(step: Step[Any], artifact: Artifact) -> bool:
    """Whether the step's code is the same as when the artifact was made (unknown counts as current)."""
    made_by = artifact.manifest.code.get("source", "")
    return not made_by or made_by == source_hash(step)
