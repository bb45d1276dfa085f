"""Removes artifacts, and what killed processes left behind. What may go is decided elsewhere: see `retention.py`."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from moray.platform.store.artifacts import PULLED, REMOVED, ArtifactStore
from moray.platform.store.lease import Lease, is_stale
from moray.platform.store.manifest import MANIFEST
from moray.platform.store.search import steps_here


def remove_artifact(store: ArtifactStore, reference: str) -> bool:
    """Deletes `step/fingerprint`, here and in the shared root.

    False, changing nothing, if a process of this machine works on it.
    """
    return _remove(store, reference, everywhere=True)


def free_artifact(store: ArtifactStore, reference: str) -> bool:
    """Deletes what is here of `step/fingerprint`. False, changing nothing, if a process works on it."""
    return _remove(store, reference, everywhere=False)


def _remove(store: ArtifactStore, reference: str, everywhere: bool) -> bool:
    step, _, fingerprint = reference.partition("/")
    lease = Lease(store.lease_path(step, fingerprint))
    if not lease.acquire():
        return False
    try:
        if everywhere and store.remote is not None:
            store.remote.remove(step, fingerprint)
        store.bury(store.folder(step, fingerprint))
    finally:
        lease.release()
    delete_buried(store)
    return True


def delete_buried(store: ArtifactStore) -> None:
    """Deletes what was removed, also by a process that was killed at it."""
    for grave in (store.root / REMOVED).glob("*"):
        shutil.rmtree(grave, ignore_errors=True)


def leftovers(store: ArtifactStore, before: float) -> list[str]:
    """`step/name` of folders without a manifest that nobody works on and nothing was written to since a time."""
    working = in_work(store)
    found = []
    for step in steps_here(store):
        for folder in (store.root / step).iterdir():
            fingerprint = folder.name.lstrip(".").partition(PULLED)[0]
            if folder.is_dir() and not (folder / MANIFEST).exists() and f"{step}/{fingerprint}" not in working:
                found += [f"{step}/{folder.name}"] if _last_change(folder) < before else []
    return sorted(found)


def in_work(store: ArtifactStore) -> set[str]:
    """`step/fingerprint` of everything that a living process is making."""
    leases = [path for step in steps_here(store) for path in (store.root / step).glob(".*.lease")]
    return {f"{p.parent.name}/{p.name[1:].removesuffix('.lease')}" for p in leases if not is_stale(p)}


def _last_change(folder: Path) -> float:
    """When anything in a folder was last written, in seconds since the epoch."""
    try:
        paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
        return max(os.stat(path, follow_symlinks=False).st_mtime for path in [str(folder), *paths])
    except FileNotFoundError:  # somebody is at it
        return time.time()
