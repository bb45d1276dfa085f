"""Chains: results of one step across runs, each of which takes the previous one as its input `earlier`.

Example: dedup of new documents against the index of all earlier runs. The alias `NAME@chain` points at the newest link.
Each artifact's address records its `earlier` input, so a repeated run finds the link it made instead of appending one.
Artifacts are immutable: if two runs continue from the same link, only the first can append, and the second raises.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping

from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.home import Home
from moray.platform.plan.fingerprint import EARLIER, identity
from moray.platform.plan.recipe import PlannedStep
from moray.platform.store.artifacts import Artifact, ArtifactStore

VERSION = "chain"


def links(store: ArtifactStore, name: str) -> Iterator[Artifact]:
    """Yields the artifacts of a chain, newest first. Raises InputError at a missing one."""
    reference = store.aliases.all().get(f"{name}@{VERSION}")
    while reference:
        step, _, fingerprint = reference.partition("/")
        artifact = store.get(step, fingerprint)
        if artifact is None:
            hint = f"start a new chain: moray artifacts unalias {name}@{VERSION}"
            raise InputError(f"chain {name!r} is broken: {reference} does not exist", hint)
        yield artifact
        reference = artifact.manifest.inputs.get(EARLIER)


def earlier(store: ArtifactStore, planned: PlannedStep, inputs: Mapping[str, str]) -> Artifact | None:
    """Returns the artifact that a step with these inputs (name -> fingerprint) continues from: the newest link, or, if
    a link was already made from these inputs, its predecessor. Raises RecipeError if the step cannot follow."""
    name = planned.step.chain(planned.config)
    if not name:
        return None
    config, newest = identity(planned.config), None
    found = links(store, name)
    for link in found:
        address = link.manifest.address
        own = {key: value for key, value in address["inputs"].items() if key != EARLIER}
        if own == dict(inputs) and address["config"] == config and address["version"] == planned.step.version:
            return next(found, None)
        newest = newest or link
    if newest is not None:
        planned.step.follow(planned.config, newest.manifest)
    return newest


def advance(store: ArtifactStore, home: Home, name: str, artifact: Artifact) -> None:
    """Appends an artifact to its chain, unless it is a link already. Raises StepFailed if another run was first."""
    home.aliases.mkdir(parents=True, exist_ok=True)
    with (home.aliases / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = [link.reference for link in links(store, name)]
        if artifact.reference in known:
            return
        if (known[0] if known else None) != artifact.manifest.inputs.get(EARLIER):
            raise StepFailed(
                f"chain {name!r}: another run appended {known[0]} during this run", "run again to continue from it"
            )
        store.aliases.set(name, VERSION, artifact.reference)
