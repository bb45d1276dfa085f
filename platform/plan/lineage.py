"""Results that go on from each other, run after run: a step's artifact takes the one before it as its input `earlier`.

Tonight's crawl against the index of all nights before is such a chain. Its end is an alias, `NAME@chain`; an artifact's
own address says what it went on from, so a run that is repeated finds the link that it made, and not itself before it.
Artifacts never change: two runs that went on from the same end cannot both become the next, and the second is told so.
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
    """The artifacts of a chain, newest first. Raises InputError at one that is gone."""
    reference = store.aliases.all().get(f"{name}@{VERSION}")
    while reference:
        step, _, fingerprint = reference.partition("/")
        artifact = store.get(step, fingerprint)
        if artifact is None:
            anew = f"begin anew: moray artifacts unalias {name}@{VERSION}"
            raise InputError(f"the chain {name!r} is broken: {reference} is gone", anew)
        yield artifact
        reference = artifact.manifest.inputs.get(EARLIER)


def earlier(store: ArtifactStore, planned: PlannedStep, inputs: Mapping[str, str]) -> Artifact | None:
    """What a step with these inputs (name -> fingerprint) goes on from: the newest link, or, of a link that was made
    from these very inputs, the one before it. Raises RecipeError if it cannot follow that."""
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
    """Makes an artifact the end of its chain, unless it is a link of it. Raises StepFailed if another one is."""
    home.aliases.mkdir(parents=True, exist_ok=True)
    with (home.aliases / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = [link.reference for link in links(store, name)]
        if artifact.reference in known:
            return
        if (known[0] if known else None) != artifact.manifest.inputs.get(EARLIER):
            raise StepFailed(
                f"the chain {name!r} has grown by {known[0]} while this run worked", "run again: it goes on from there"
            )
        store.aliases.set(name, VERSION, artifact.reference)
