"""The artifact store: `<root>/<step>/<fingerprint>/` with its manifest, and leases.

A folder without a manifest is work in progress or a leftover. The manifest is created, not replaced: if two writers
race, the first wins and both see the same artifact. An artifact is removed in one step too: its folder moves to
`.removed/` and is deleted there.

With a shared root (platform/store/remote.py) this folder is staging area and cache, and the shared root is the truth:
what is made here is copied there before it counts as made, and what is only there comes here when its files are needed.

Beside it: `search.py` finds artifacts, `aliases.py` and `pins.py` hold names and pins, `sweep.py` removes.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moray.platform.core.atomic import create_bytes, is_full
from moray.platform.core.errors import InputError, MorayError
from moray.platform.core.home import Home
from moray.platform.core.units import size
from moray.platform.store.aliases import Aliases
from moray.platform.store.lease import Lease
from moray.platform.store.manifest import MANIFEST, DamagedError, Manifest, read_manifest
from moray.platform.store.pins import Pins

if TYPE_CHECKING:
    from moray.platform.store.remote import RemoteArtifacts, SharedManifest


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and manifest. The folder may not be here yet: see `ArtifactStore.fetch`.

    `url` is where its files lie in the shared root, where somebody asked for that: see `ArtifactStore.locate`.
    """

    folder: Path
    manifest: Manifest
    url: str = ""

    @property
    def address(self) -> str:
        """Where its files are read: the folder, or an `s3://` address."""
        return self.url or str(self.folder)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def reference(self) -> str:
        return f"{self.manifest.step}/{self.manifest.fingerprint}"

    @property
    def here(self) -> bool:
        """Whether its files are on this machine."""
        return (self.folder / MANIFEST).is_file()


REMOVED = ".removed"  # the folder of what is to be deleted
PULLED = ".pull-"  # stands in the name of a folder that is on its way here
Progress = Callable[[str, float, float], None]  # what is being done, bytes done, bytes in all


def _unseen(phase: str, done: float, total: float) -> None:
    """Progress that nobody looks at."""


class ArtifactStore:
    """Artifacts under one MORAY_HOME, and under its shared root if it has one, with their aliases and pins."""

    def __init__(self, home: Home) -> None:
        self.root = home.artifacts
        self.remote = _shared_root(home.shared)
        self.aliases = Aliases(home.aliases, self.remote)
        self.pins = Pins(home.pins)
        self._damaged: dict[str, DamagedError] = {}  # met here so far, by reference

    def folder(self, step: str, fingerprint: str) -> Path:
        return self.root / step / fingerprint

    def lease_path(self, step: str, fingerprint: str) -> Path:
        return self.root / step / f".{fingerprint}.lease"

    def check(self) -> None:
        """Raises InputError if there is a shared root that cannot be written."""
        if self.remote is not None:
            self.remote.check_writable()

    def get(self, step: str, fingerprint: str) -> Artifact | None:
        """The artifact, here or in the shared root, or None if it has no manifest. Raises DamagedError for one that is
        damaged here, and not whole in the shared root."""
        found = self.whole(step, fingerprint)
        if found is None and self.remote is not None and (shared := self.remote.get(step, fingerprint)):
            found = Artifact(self.folder(step, fingerprint), shared.local())
        return found or self.local(step, fingerprint)

    def local(self, step: str, fingerprint: str) -> Artifact | None:
        """The artifact if its files are here. Raises DamagedError if its manifest cannot be read."""
        self._damaged.pop(f"{step}/{fingerprint}", None)
        folder = self.folder(step, fingerprint)
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError as error:
            raise DamagedError(f"{step}/{fingerprint}", str(path), "it is a folder") from error
        except OSError as error:  # it may be whole: a disk or a file system that does not answer, another user's file
            problem = error.strerror or str(error)
            raise DamagedError(f"{step}/{fingerprint}", str(path), problem, "make it readable") from error
        return Artifact(folder, read_manifest(Manifest, text, step, fingerprint, str(path)))

    def whole(self, step: str, fingerprint: str) -> Artifact | None:
        """As `local`, but None for one that is damaged, which is kept in mind."""
        try:
            return self.local(step, fingerprint)
        except DamagedError as error:
            if self.remote is not None and self.remote.whole(step, fingerprint) is not None:
                error.hint = "the copy in the shared root is whole: it is fetched when it is needed"
            self._damaged[error.reference] = error
            return None

    def damaged(self) -> list[DamagedError]:
        """The artifacts that listings of this store have passed over, because their manifests cannot be read."""
        return [*self._damaged.values(), *(self.remote.damaged.values() if self.remote else ())]

    def prepare(self, step: str, fingerprint: str, keep_leftovers: bool) -> Path:
        """The folder to work in, empty unless leftovers of a killed attempt are to be gone on from."""
        folder = self.folder(step, fingerprint)
        if folder.exists() and not keep_leftovers:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, manifest: Manifest, progress: Progress = _unseen) -> Artifact:
        """Writes the manifest, last of all. If another writer was first, its artifact is returned.

        With a shared root, the files go there first. Where that fails, the artifact is kept here, to be copied by the
        next run that wants it, and the error is raised.
        """
        if self.remote is not None:
            folder = self.folder(manifest.step, manifest.fingerprint)
            try:
                shared = self.remote.push(folder, manifest, partial(progress, "uploading"))
            except MorayError:
                self._seal(manifest)
                raise
            if shared.files != manifest.files:
                return self._pull(shared, progress)
            manifest = shared.local()
        return self._seal(manifest)

    def publish(self, artifact: Artifact, progress: Progress = _unseen) -> Artifact:
        """Copies an artifact that was made here alone to the shared root; a rival's takes its place if one was first.

        Nothing happens without a shared root, or if a process works on the artifact.
        """
        lease = Lease(self.lease_path(artifact.manifest.step, artifact.fingerprint))
        if self.remote is None or not artifact.here or not lease.acquire():
            return artifact
        try:
            shared = self.remote.push(artifact.folder, artifact.manifest, partial(progress, "uploading"))
            return artifact if shared.files == artifact.manifest.files else self._pull(shared, progress)
        finally:
            lease.release()

    def fetch(self, artifact: Artifact, progress: Progress = _unseen) -> Artifact:
        """The artifact with its files here, pulled from the shared root if need be. Raises InputError."""
        step, fingerprint = artifact.manifest.step, artifact.fingerprint
        lease = Lease(self.lease_path(step, fingerprint))

        def is_here() -> bool:
            return self.whole(step, fingerprint) is not None

        if not is_here() and (lease.acquire() or lease.wait(is_here, lambda: False)):
            try:
                shared = None if self.remote is None or is_here() else self.remote.get(step, fingerprint)
                if shared is not None:
                    return self._pull(shared, progress)
            finally:
                lease.release()
        found = self.local(step, fingerprint)
        if found is None:
            raise InputError(f"{artifact.reference} is gone", "run the recipe that makes it again")
        return found

    def locate(self, artifact: Artifact) -> Artifact:
        """The artifact with the address of its files: here, or else in the shared root. Raises InputError."""
        step, fingerprint = artifact.manifest.step, artifact.fingerprint
        if (found := self.whole(step, fingerprint)) is not None:
            return found
        shared = self.remote.get(step, fingerprint) if self.remote else None
        if self.remote is None or shared is None:
            self.local(step, fingerprint)  # which says it if it is damaged
            raise InputError(f"{artifact.reference} is gone", "run the recipe that makes it again")
        return Artifact(self.folder(step, fingerprint), shared.local(), self.remote.address(shared))

    def _pull(self, shared: SharedManifest, progress: Progress) -> Artifact:
        """Brings files here under a lease: into a temporary folder, checked, then to their place, the manifest last."""
        assert self.remote is not None
        folder = self.folder(shared.step, shared.fingerprint)
        for torn in folder.parent.glob(f".{shared.fingerprint}{PULLED}*"):
            shutil.rmtree(torn)
        coming = folder.parent / f".{shared.fingerprint}{PULLED}{secrets.token_hex(4)}"
        coming.mkdir(parents=True)
        try:
            self.remote.pull(shared, coming, partial(progress, "downloading"))
            self.bury(folder)
            coming.rename(folder)
        except OSError as error:
            if not is_full(error):
                raise
            what = f"{shared.step}/{shared.fingerprint[:8]} ({size(shared.bytes)})"
            raise InputError(f"{self.root} has no room for {what}", "free some disk: moray artifacts gc") from error
        finally:
            shutil.rmtree(coming, ignore_errors=True)
        return self._seal(shared.local())

    def _seal(self, manifest: Manifest) -> Artifact:
        folder = self.folder(manifest.step, manifest.fingerprint)
        create_bytes(folder / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
        committed = self.local(manifest.step, manifest.fingerprint)
        assert committed is not None
        return committed

    def bury(self, folder: Path) -> None:
        """Removes an artifact's folder in one step; what it holds is deleted later: see `sweep.py`."""
        (self.root / REMOVED).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it was not here, or a rival removed it
            folder.rename(self.root / REMOVED / f"{folder.name}-{secrets.token_hex(4)}")


def _shared_root(url: str) -> RemoteArtifacts | None:
    if not url:
        return None
    from moray.platform.store.remote import RemoteArtifacts

    return RemoteArtifacts(url)
