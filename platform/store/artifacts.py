"""The artifact store: `<root>/<step>/<fingerprint>/` with its manifest, and leases.

A folder without a manifest is work in progress or a leftover. The manifest is created, never replaced: if two writers
race, the first wins and both see the same artifact. Removal is atomic too: the folder is moved to `.removed/` and
deleted there.

With a shared root (platform/store/remote.py), the shared root is the source of truth and the local folder is a staging
area and cache. New artifacts are uploaded before they count as finished; remote artifacts are downloaded when their
files are needed.

Related modules: `search.py` finds artifacts, `aliases.py` and `pins.py` hold names and pins, `sweep.py` removes.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Sequence
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
from moray.platform.store.manifest import MANIFEST, DamagedError, FileEntry, Manifest, read_manifest
from moray.platform.store.paths import AnyPath, any_path
from moray.platform.store.pins import Pins

if TYPE_CHECKING:
    from moray.platform.store.remote import RemoteArtifacts, SharedManifest
    from moray.platform.store.store_lease import StoreLease


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and manifest. Its files may not be on this machine: see `ArtifactStore.fetch`.

    `url` is the address of its files in the shared root, if set by `ArtifactStore.locate`.
    """

    folder: Path
    manifest: Manifest
    url: str = ""

    @property
    def address(self) -> str:
        """The location of its files: the local folder, or an `s3://` address."""
        return self.url or str(self.folder)

    @property
    def location(self) -> AnyPath:
        """The folder of its files, for tasks on any host."""
        return any_path(self.address)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def reference(self) -> str:
        return f"{self.manifest.step}/{self.manifest.fingerprint}"

    @property
    def is_local(self) -> bool:
        """Whether its files are on this machine."""
        return (self.folder / MANIFEST).is_file()


REMOVED = ".removed"  # folder of artifacts to be deleted
PULLED = ".pull-"  # infix in the name of a folder that is being downloaded
Progress = Callable[[str, float, float], None]  # phase, bytes done, total bytes


def _no_progress(phase: str, done: float, total: float) -> None:
    """Ignores progress."""


class ArtifactStore:
    """The artifacts under one MORAY_HOME and its shared root, if any, with their aliases and pins."""

    def __init__(self, home: Home) -> None:
        self.root = home.artifacts
        self.remote = _shared_root(home.shared)
        self.aliases = Aliases(home.aliases, self.remote)
        self.pins = Pins(home.pins)
        self._damaged: dict[str, DamagedError] = {}  # damaged local artifacts found so far, by reference

    def folder(self, step: str, fingerprint: str) -> Path:
        return self.root / step / fingerprint

    def lease_path(self, step: str, fingerprint: str) -> Path:
        return self.root / step / f".{fingerprint}.lease"

    def lease(self, step: str, fingerprint: str, everywhere: bool = False, run: str = "") -> Lease | StoreLease:
        """The lease of a process that makes the artifact. everywhere: with tasks on several hosts. run: its run."""
        if everywhere:
            assert self.remote is not None
            return self.remote.lease(step, fingerprint, run)
        return Lease(self.lease_path(step, fingerprint))

    def check(self) -> None:
        """Raises InputError if there is a shared root that is not writable."""
        if self.remote is not None:
            self.remote.check_writable()

    def get(self, step: str, fingerprint: str) -> Artifact | None:
        """Returns the artifact, local or in the shared root, or None if it has no manifest. Raises DamagedError if the
        local one is damaged and the shared root has no intact copy."""
        found = self.local_or_none(step, fingerprint)
        if found is None and self.remote is not None and (shared := self.remote.get(step, fingerprint)):
            found = Artifact(self.folder(step, fingerprint), shared.local())
        return found or self.local(step, fingerprint)

    def local(self, step: str, fingerprint: str) -> Artifact | None:
        """Returns the artifact if its files are on this machine. Raises DamagedError if its manifest cannot be read."""
        self._damaged.pop(f"{step}/{fingerprint}", None)
        folder = self.folder(step, fingerprint)
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError as error:
            raise DamagedError(f"{step}/{fingerprint}", str(path), "is a folder, not a file") from error
        except OSError as error:  # it may be intact: an I/O error, a hanging file system, or another user's file
            problem = error.strerror or str(error)
            raise DamagedError(f"{step}/{fingerprint}", str(path), problem, "make it readable") from error
        return Artifact(folder, read_manifest(Manifest, text, step, fingerprint, str(path)))

    def local_or_none(self, step: str, fingerprint: str) -> Artifact | None:
        """Like `local`, but returns None for a damaged artifact and records it in `damaged`."""
        try:
            return self.local(step, fingerprint)
        except DamagedError as error:
            if self.remote is not None and self.remote.get_or_none(step, fingerprint) is not None:
                error.hint = "the copy in the shared root is intact and will be downloaded when needed"
            self._damaged[error.reference] = error
            return None

    def damaged(self) -> list[DamagedError]:
        """Returns the artifacts that listings skipped because their manifests cannot be read."""
        return [*self._damaged.values(), *(self.remote.damaged.values() if self.remote else ())]

    def prepare(self, step: str, fingerprint: str, keep_leftovers: bool) -> Path:
        """Creates a step's output folder, empty unless `keep_leftovers` (for resuming a killed attempt)."""
        folder = self.folder(step, fingerprint)
        if folder.exists() and not keep_leftovers:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, manifest: Manifest, progress: Progress = _no_progress) -> Artifact:
        """Writes the manifest, as the last step. If another writer was first, returns that writer's artifact.

        With a shared root, the files are uploaded first. If that fails, the artifact is kept locally, to be uploaded by
        the next run that uses it, and the error is raised.
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

    def complete(self, manifest: Manifest, local: Sequence[FileEntry], progress: Progress = _no_progress) -> Artifact:
        """As `commit`, for an artifact whose tasks wrote to the store. local: its files in this host's folder."""
        assert self.remote is not None
        folder = self.folder(manifest.step, manifest.fingerprint)
        shared = self.remote.complete(folder, local, manifest, partial(progress, "uploading"))
        shutil.rmtree(folder, ignore_errors=True)  # it holds a part of the files
        return self._located(shared)

    def publish(self, artifact: Artifact, progress: Progress = _no_progress) -> Artifact:
        """Uploads an artifact that exists only locally to the shared root. If another machine was first, its artifact
        replaces the local one.

        No-op without a shared root, or if another process holds the artifact's lease.
        """
        lease = Lease(self.lease_path(artifact.manifest.step, artifact.fingerprint))
        if self.remote is None or not artifact.is_local or not lease.acquire():
            return artifact
        try:
            shared = self.remote.push(artifact.folder, artifact.manifest, partial(progress, "uploading"))
            return artifact if shared.files == artifact.manifest.files else self._pull(shared, progress)
        finally:
            lease.release()

    def fetch(self, artifact: Artifact, progress: Progress = _no_progress) -> Artifact:
        """Returns the artifact with its files on this machine, downloading them if needed. Raises InputError."""
        step, fingerprint = artifact.manifest.step, artifact.fingerprint
        lease = Lease(self.lease_path(step, fingerprint))

        def is_local() -> bool:
            return self.local_or_none(step, fingerprint) is not None

        if not is_local() and (lease.acquire() or lease.wait(is_local, lambda: False)):
            try:
                shared = None if self.remote is None or is_local() else self.remote.get(step, fingerprint)
                if shared is not None:
                    return self._pull(shared, progress)
            finally:
                lease.release()
        found = self.local(step, fingerprint)
        if found is None:
            raise InputError(f"artifact {artifact.reference} no longer exists", "run its recipe again")
        return found

    def locate(self, artifact: Artifact, everywhere: bool = False) -> Artifact:
        """Returns the artifact with the address of its files: local, or else in the shared root. Raises InputError.

        everywhere: an address that other hosts can read.
        """
        step, fingerprint = artifact.manifest.step, artifact.fingerprint
        if (found := self.local_or_none(step, fingerprint)) is not None:
            if not everywhere:
                return found
            self.publish(found)
        shared = self.remote.get(step, fingerprint) if self.remote else None
        if self.remote is None or shared is None:
            self.local(step, fingerprint)  # raises if it is damaged
            raise InputError(f"artifact {artifact.reference} no longer exists", "run its recipe again")
        return self._located(shared)

    def _located(self, shared: SharedManifest) -> Artifact:
        assert self.remote is not None
        return Artifact(self.folder(shared.step, shared.fingerprint), shared.local(), self.remote.address(shared))

    def _pull(self, shared: SharedManifest, progress: Progress) -> Artifact:
        """Downloads an artifact (the lease is held) to a temporary folder, verifies and renames it; manifest last."""
        assert self.remote is not None
        folder = self.folder(shared.step, shared.fingerprint)
        for partial_download in folder.parent.glob(f".{shared.fingerprint}{PULLED}*"):
            shutil.rmtree(partial_download)
        temporary = folder.parent / f".{shared.fingerprint}{PULLED}{secrets.token_hex(4)}"
        temporary.mkdir(parents=True)
        try:
            self.remote.pull(shared, temporary, partial(progress, "downloading"))
            self.discard(folder)
            temporary.rename(folder)
        except OSError as error:
            if not is_full(error):
                raise
            artifact = f"{shared.step}/{shared.fingerprint[:8]} ({size(shared.bytes)})"
            raise InputError(
                f"not enough disk space in {self.root} for {artifact}", "free some: moray artifacts gc"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self._seal(shared.local())

    def _seal(self, manifest: Manifest) -> Artifact:
        folder = self.folder(manifest.step, manifest.fingerprint)
        create_bytes(folder / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
        committed = self.local(manifest.step, manifest.fingerprint)
        assert committed is not None
        return committed

    def discard(self, folder: Path) -> None:
        """Atomically moves an artifact's folder to `.removed/`; `sweep.py` deletes its contents later."""
        (self.root / REMOVED).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it did not exist, or another process removed it
            folder.rename(self.root / REMOVED / f"{folder.name}-{secrets.token_hex(4)}")


def _shared_root(url: str) -> RemoteArtifacts | None:
    if not url or url.startswith("/"):  # artifacts in a shared folder are read and written in place
        return None
    from moray.platform.store.remote import RemoteArtifacts

    return RemoteArtifacts(url)
