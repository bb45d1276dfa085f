"""The stages a documents artifact went through, from its manifest and those of what it was made from.

So a recipe names one input, the last stage, and nobody lists the others, which its fingerprint holds already. Retention
removes no artifact before what was made from it; with a shared root, what lies only there is brought here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.store.artifacts import Artifact, ArtifactStore

_KIND = "documents"


@dataclass(frozen=True)
class Stage:
    """label: the step's name, with a number where it comes again."""

    label: str
    artifact: Artifact


def stages_of(artifact: Artifact, home: Home) -> list[Stage]:
    """The artifact and its ancestors by the input `documents`, the first of them first. Raises InputError."""
    store, line = ArtifactStore(home), [artifact]
    while (reference := line[-1].manifest.inputs.get(_KIND)) is not None:
        step, _, fingerprint = reference.partition("/")
        parent = store.get(step, fingerprint)
        if parent is None:
            raise InputError(f"{reference}, which {line[-1].reference} was made from, is gone", "run its recipe again")
        if parent.manifest.produces != _KIND:
            break
        line.append(store.fetch(parent))
    seen: Counter[str] = Counter()
    stages = []
    for one in reversed(line):
        seen[one.manifest.step] += 1
        again = seen[one.manifest.step]
        stages.append(Stage(one.manifest.step if again == 1 else f"{one.manifest.step} {again}", one))
    return stages
