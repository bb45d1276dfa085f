"""Looks for artifacts in a store, by name or by step. Damaged ones are passed over: see `ArtifactStore.damaged`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from moray.platform.core.errors import InputError, nearest
from moray.platform.store.artifacts import REMOVED, Artifact, ArtifactStore
from moray.platform.store.manifest import MANIFEST


def steps_here(store: ArtifactStore) -> list[str]:
    """The steps that have a folder here."""
    return sorted(path.name for path in store.root.glob("*") if path.is_dir() and path.name != REMOVED)


def artifacts_of(store: ArtifactStore, step: str) -> list[Artifact]:
    """The finished artifacts of a step that are here, newest first."""
    paths = (store.root / step).glob(f"[!.]*/{MANIFEST}")
    return _newest_first(a for path in paths if (a := store.whole(step, path.parent.name)))


def artifacts_here(store: ArtifactStore) -> Iterator[Artifact]:
    """All finished artifacts that are here, by step, newest first."""
    for step in steps_here(store):
        yield from artifacts_of(store, step)


def shared_artifacts(store: ArtifactStore) -> Iterator[Artifact]:
    """All artifacts of the shared root, by step, newest first."""
    for step in store.remote.steps() if store.remote else ():
        yield from _newest_first(_shared_of(store, step))


def newest_artifact(store: ArtifactStore, step: str) -> Artifact | None:
    """The artifact of a step that was made last: of those here, or else of those in the shared root."""
    return next(iter(artifacts_of(store, step) or _newest_first(_shared_of(store, step))), None)


def artifact_here(store: ArtifactStore, fingerprint: str) -> Artifact | None:
    """The artifact with this whole fingerprint, whatever its step, if its files are here."""
    return next((a for step in steps_here(store) if fingerprint and (a := store.whole(step, fingerprint))), None)


def artifact_by_fingerprint(store: ArtifactStore, fingerprint: str) -> Artifact | None:
    """The artifact with this whole fingerprint, whatever its step, here or in the shared root."""
    here = artifact_here(store, fingerprint)
    if here or store.remote is None or not fingerprint:
        return here
    return next((a for step in store.remote.steps() for a in _shared_of(store, step, fingerprint)), None)


def find_artifact(store: ArtifactStore, reference: str) -> Artifact:
    """An artifact by alias `name@version`, by `step/fingerprint` (a unique prefix is enough), or by its folder.

    Its files need not be here: see `ArtifactStore.fetch`. Raises InputError, and DamagedError for one that is damaged.
    """
    aliases = store.aliases.all()
    if "@" in reference and reference not in aliases and reference in store.aliases.damaged():
        raise InputError(f"alias {reference} is damaged: it names no artifact", f"moray artifacts unalias {reference}")
    step, fingerprint = _step_and_beginning(aliases.get(reference, reference))
    matches = {a.fingerprint: a for a in _shared_of(store, step, fingerprint)} if fingerprint else {}
    here = artifacts_of(store, step)
    matches |= {a.fingerprint: a for a in here if fingerprint and a.fingerprint.startswith(fingerprint)}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if matches:
        raise InputError(f"{reference!r} names {len(matches)} artifacts", "give more of the fingerprint")
    for damaged in store.damaged():
        if fingerprint and damaged.reference.startswith(f"{step}/{fingerprint}"):
            raise damaged
    known = [*aliases, *(f"{step}/..." for step in steps_here(store))]
    raise InputError(f"no artifact {reference!r}", nearest(reference, known))


def _step_and_beginning(target: str) -> tuple[str, str]:
    """The step and the first characters of the fingerprint that `step/fingerprint` or a folder names."""
    folder = Path(target).expanduser()
    if folder.is_absolute() or (folder / MANIFEST).is_file():
        step, fingerprint = folder.resolve().parts[-2:]
    else:
        step, _, fingerprint = target.partition("/")
    return step, fingerprint


def _shared_of(store: ArtifactStore, step: str, beginning: str = "") -> Iterator[Artifact]:
    for found in store.remote.of_step(step, beginning) if store.remote else ():
        yield Artifact(store.folder(step, found.fingerprint), found.local())


def _newest_first(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return sorted(artifacts, key=lambda a: a.manifest.started, reverse=True)
