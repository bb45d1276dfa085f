"""The stages of a documents artifact, from its manifest and those of its ancestors.

A recipe names only the last stage as input, because its fingerprint covers the others. Retention keeps an artifact as
long as artifacts made from it exist. Artifacts that exist only in the store are read there or fetched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from moray.platform.core.errors import InputError
from moray.platform.store.artifacts import Artifact, ArtifactStore

_KIND = "documents"


@dataclass(frozen=True)
class Stage:
    """A stage. label: the name of the step, with a number if the step occurs more than once."""

    label: str
    artifact: Artifact


def stages_of(artifact: Artifact, store: ArtifactStore, find: Callable[[str], Artifact]) -> list[Stage]:
    """The artifact and its ancestors by the input `documents`, oldest first. find: see `StepContext.artifact`.

    Raises InputError if an ancestor has been removed.
    """
    chain = [artifact]
    while (reference := chain[-1].manifest.inputs.get(_KIND)) is not None:
        step, _, fingerprint = reference.partition("/")
        parent = store.get(step, fingerprint)
        if parent is None:
            raise InputError(
                f"{reference}, an input of {chain[-1].reference}, has been removed", "run its recipe again"
            )
        if parent.manifest.produces != _KIND:
            break
        chain.append(find(reference))
    seen: Counter[str] = Counter()
    stages = []
    for one in reversed(chain):
        seen[one.manifest.step] += 1
        number = seen[one.manifest.step]
        stages.append(Stage(one.manifest.step if number == 1 else f"{one.manifest.step} {number}", one))
    return stages
