"""Removes artifacts, and leftovers of killed processes. `retention.py` decides which artifacts may be removed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from moray.platform.store.artifacts import PULLED, REMOVED, ArtifactStore
from moray.platform.store.lease import Lease, is_stale
from moray.platform.store.manifest import MANIFEST
from moray.platform.store.search import local_steps


def remove_artifact(store: ArtifactStore, reference: str) -> bool:
    """Deletes `step/fingerprint`, on this machine and in the shared root.

    Returns False and changes nothing if a process of this machine holds its lease.
    """
    return _remove(store, reference, everywhere=True)


def free_artifact(store: ArtifactStore, reference: str) -> bool:
    """Deletes the local copy of `step/fingerprint`. Returns False and changes nothing if a process holds its lease."""
    return _remove(store, reference, everywhere=False)


def _remove(store: ArtifactStore, reference: str, everywhere: bool) -> bool:
    step, _, fingerprint = reference.partition("/")
    lease = Lease(store.lease_path(step, fingerprint))
    if not lease.acquire():
        return False
    try:
        if everywhere and store.remote is not None:
            store.remote.remove(step, fingerprint)
        store.discard(store.folder(step, fingerprint))
    finally:
        lease.release()
    delete_discarded(store)
    return True


def delete_discarded(store: ArtifactStore) -> None:
    """Deletes discarded folders, including those of a process that was killed while deleting."""
    for discarded in (store.root / REMOVED).glob("*"):
        shutil.rmtree(discarded, ignore_errors=True)


def leftovers(store: ArtifactStore, before: float) -> list[str]:
    """Returns `step/name` of folders without a manifest or a lease that were last written to before a time."""
    working = leased(store)
    found = []
    for step in local_steps(store):
        for folder in (store.root / step).iterdir():
            fingerprint = folder.name.lstrip(".").partition(PULLED)[0]
            if folder.is_dir() and not (folder / MANIFEST).exists() and f"{step}/{fingerprint}" not in working:
                found += [f"{step}/{folder.name}"] if _last_change(folder) < before else []
    return sorted(found)


def leased(store: ArtifactStore) -> set[str]:
    """Returns `step/fingerprint` of every artifact that a live process is making."""
    leases = [path for step in local_steps(store) for path in (store.root / step).glob(".*.lease")]
    return {f"{p.parent.name}/{p.name[1:].removesuffix('.lease')}" for p in leases if not is_stale(p)}


def _last_change(folder: Path) -> float:
    """The newest modification time in a folder, in seconds since the epoch."""
    try:
        paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
        return max(os.stat(path, follow_symlinks=False).st_mtime for path in [str(folder), *paths])
    except FileNotFoundError:  # another process is changing it
        return time.time()
