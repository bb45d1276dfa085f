"""Finds artifacts in a store, by name or by step. Damaged ones are skipped: see `ArtifactStore.damaged`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from moray.platform.core.errors import InputError, nearest
from moray.platform.core.home import Home
from moray.platform.store.artifacts import REMOVED, Artifact, ArtifactStore
from moray.platform.store.manifest import MANIFEST


def local_steps(store: ArtifactStore) -> list[str]:
    """Returns the steps that have a folder on this machine."""
    return sorted(path.name for path in store.root.glob("*") if path.is_dir() and path.name != REMOVED)


def artifacts_of(store: ArtifactStore, step: str) -> list[Artifact]:
    """Returns the finished local artifacts of a step, newest first."""
    paths = (store.root / step).glob(f"[!.]*/{MANIFEST}")
    return _newest_first(a for path in paths if (a := store.local_or_none(step, path.parent.name)))


def local_artifacts(store: ArtifactStore) -> Iterator[Artifact]:
    """Yields all finished local artifacts, by step, newest first."""
    for step in local_steps(store):
        yield from artifacts_of(store, step)


def shared_artifacts(store: ArtifactStore) -> Iterator[Artifact]:
    """Yields all artifacts of the shared root, by step, newest first."""
    for step in store.remote.steps() if store.remote else ():
        yield from _newest_first(_shared_of(store, step))


def step_artifacts(store: ArtifactStore, step: str) -> list[Artifact]:
    """Returns the finished artifacts of a step, local ones first, then those of the shared root; newest first."""
    return [*artifacts_of(store, step), *_newest_first(_shared_of(store, step))]


def newest_artifact(store: ArtifactStore, step: str) -> Artifact | None:
    """Returns the newest artifact of a step: the newest local one, or else the newest one in the shared root."""
    return next(iter(artifacts_of(store, step) or _newest_first(_shared_of(store, step))), None)


def local_artifact(store: ArtifactStore, fingerprint: str) -> Artifact | None:
    """Returns the artifact of any step with this full fingerprint, if its files are on this machine."""
    return next(
        (a for step in local_steps(store) if fingerprint and (a := store.local_or_none(step, fingerprint))), None
    )


def artifact_by_fingerprint(store: ArtifactStore, fingerprint: str) -> Artifact | None:
    """Returns the artifact of any step with this full fingerprint, local or in the shared root."""
    local = local_artifact(store, fingerprint)
    if local or store.remote is None or not fingerprint:
        return local
    return next((a for step in store.remote.steps() for a in _shared_of(store, step, fingerprint)), None)


def find_artifact(store: ArtifactStore, reference: str) -> Artifact:
    """Finds an artifact by alias `name@version`, by `step/fingerprint` (a unique prefix is enough), or by its folder.

    Its files may not be on this machine: see `ArtifactStore.fetch`. Raises InputError, or DamagedError for a damaged
    artifact.
    """
    aliases = store.aliases.all()
    if "@" in reference and reference not in aliases and reference in store.aliases.damaged():
        raise InputError(
            f"alias {reference} is damaged: it names no artifact", f"remove it: moray artifacts unalias {reference}"
        )
    step, fingerprint = _step_and_prefix(aliases.get(reference, reference))
    matches = {a.fingerprint: a for a in _shared_of(store, step, fingerprint)} if fingerprint else {}
    local = artifacts_of(store, step)
    matches |= {a.fingerprint: a for a in local if fingerprint and a.fingerprint.startswith(fingerprint)}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if matches:
        raise InputError(f"{reference!r} matches {len(matches)} artifacts", "give a longer prefix of the fingerprint")
    for damaged in store.damaged():
        if fingerprint and damaged.reference.startswith(f"{step}/{fingerprint}"):
            raise damaged
    known = [*aliases, *(f"{step}/..." for step in local_steps(store))]
    raise InputError(f"unknown artifact {reference!r}", nearest(reference, known))


def bring_alias(names: str) -> Path:
    """The folder, on this machine, of the artifact that the first known alias of `NAME@VERSION|NAME@VERSION` names.
    Raises InputError."""
    store = ArtifactStore(Home.from_environment())
    known = store.aliases.all()
    for name in names.split("|"):
        if name in known:
            return store.fetch(find_artifact(store, name)).folder
    last = names.rpartition("|")[2]
    raise InputError(f"unknown alias {last!r}", nearest(last, known) or f"moray run {last.partition('@')[0]}")


def _step_and_prefix(target: str) -> tuple[str, str]:
    """Splits `step/fingerprint` or a folder into the step and a prefix of the fingerprint."""
    try:
        folder = Path(target).expanduser()
        if folder.is_absolute() or (folder / MANIFEST).is_file():
            step, fingerprint = folder.resolve().parts[-2:]
            return step, fingerprint
    except (OSError, RuntimeError, ValueError):  # too long, or of a user who does not exist
        pass
    step, _, fingerprint = target.partition("/")
    return step, fingerprint


def _shared_of(store: ArtifactStore, step: str, prefix: str = "") -> Iterator[Artifact]:
    for found in store.remote.of_step(step, prefix) if store.remote else ():
        yield Artifact(store.folder(step, found.fingerprint), found.local())


def _newest_first(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return sorted(artifacts, key=lambda a: a.manifest.started, reverse=True)
