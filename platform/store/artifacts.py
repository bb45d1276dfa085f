"""The artifact store: `<root>/<step>/<fingerprint>/` with its manifest, leases, and named aliases.

A folder without a manifest is work in progress or a leftover. The manifest is created, not replaced: if two writers
race, the first wins and both see the same artifact. An artifact is removed in one step too: its folder moves to
`.removed/` and is deleted there.

With a shared root (platform/store/remote.py) this folder is staging area and cache, and the shared root is the truth:
what is made here is copied there before it counts as made, and what is only there comes here when its files are needed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moray.platform.core.atomic import create_bytes, is_full, write_text
from moray.platform.core.errors import InputError, MorayError, nearest
from moray.platform.core.home import Home
from moray.platform.core.units import size
from moray.platform.store.lease import Lease, is_stale
from moray.platform.store.manifest import MANIFEST, REFERENCE, DamagedError, Manifest, read_manifest

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


_REMOVED = ".removed"
_PULLED = ".pull-"
Progress = Callable[[str, float, float], None]  # what is being done, bytes done, bytes in all


def _unseen(phase: str, done: float, total: float) -> None:
    """Progress that nobody looks at."""


class ArtifactStore:
    """Artifacts and aliases under one MORAY_HOME, and under its shared root if it has one."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.root = home.artifacts
        self.remote = _shared_root(home.shared)
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
        for torn in folder.parent.glob(f".{shared.fingerprint}{_PULLED}*"):
            shutil.rmtree(torn)
        coming = folder.parent / f".{shared.fingerprint}{_PULLED}{secrets.token_hex(4)}"
        coming.mkdir(parents=True)
        try:
            self.remote.pull(shared, coming, partial(progress, "downloading"))
            self._bury(folder)
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

    def of_step(self, step: str) -> Iterator[Artifact]:
        """The finished artifacts of a step that are here, newest first; without damaged ones."""
        paths = (self.root / step).glob(f"[!.]*/{MANIFEST}")
        yield from _newest_first(a for path in paths if (a := self.whole(step, path.parent.name)))

    def whole(self, step: str, fingerprint: str) -> Artifact | None:
        """As `local`, but None for one that is damaged, which is kept in mind."""
        try:
            return self.local(step, fingerprint)
        except DamagedError as error:
            if self.remote is not None and self.remote.whole(step, fingerprint) is not None:
                error.hint = "the copy in the shared root is whole: it is fetched when it is needed"
            self._damaged[error.reference] = error
            return None

    def newest(self, step: str) -> Artifact | None:
        """The artifact of a step that was made last: of those here, or else of those in the shared root."""
        return next(self.of_step(step), None) or next(iter(_newest_first(self._shared_of(step))), None)

    def steps(self) -> list[str]:
        """The steps that have a folder here."""
        return sorted(path.name for path in self.root.glob("*") if path.is_dir() and path.name != _REMOVED)

    def all(self) -> Iterator[Artifact]:
        """All finished artifacts that are here, by step, newest first."""
        for step in self.steps():
            yield from self.of_step(step)

    def shared(self) -> Iterator[Artifact]:
        """All artifacts of the shared root, by step, newest first."""
        for step in self.remote.steps() if self.remote else ():
            yield from _newest_first(self._shared_of(step))

    def _shared_of(self, step: str, beginning: str = "") -> Iterator[Artifact]:
        for found in self.remote.of_step(step, beginning) if self.remote else ():
            yield Artifact(self.folder(step, found.fingerprint), found.local())

    def by_fingerprint(self, fingerprint: str) -> Artifact | None:
        """The artifact with this whole fingerprint, whatever its step."""
        here = next((a for step in self.steps() if fingerprint and (a := self.whole(step, fingerprint))), None)
        if here or self.remote is None or not fingerprint:
            return here
        return next((a for step in self.remote.steps() for a in self._shared_of(step, fingerprint)), None)

    def in_work(self) -> set[str]:
        """`step/fingerprint` of everything that a living process is making."""
        leases = [path for step in self.steps() for path in (self.root / step).glob(".*.lease")]
        return {f"{p.parent.name}/{p.name[1:].removesuffix('.lease')}" for p in leases if not is_stale(p)}

    def pin(self, artifact: Artifact) -> None:
        """Keeps an artifact, and what it was made from, out of `gc` and `rm`."""
        write_text(self._home.pins / artifact.reference, "")

    def unpin(self, artifact: Artifact) -> None:
        """Raises InputError if it is not pinned."""
        if artifact.reference not in self.pins():
            raise InputError(f"{artifact.reference} is not pinned", nearest(artifact.reference, self.pins()))
        (self._home.pins / artifact.reference).unlink()

    def pins(self) -> list[str]:
        """`step/fingerprint` of every pinned artifact."""
        return sorted(path.relative_to(self._home.pins).as_posix() for path in self._home.pins.glob("*/[!.]*"))

    def remove(self, reference: str) -> bool:
        """Deletes `step/fingerprint`, here and in the shared root.

        False, changing nothing, if a process of this machine works on it.
        """
        return self._remove(reference, everywhere=True)

    def free(self, reference: str) -> bool:
        """Deletes what is here of `step/fingerprint`. False, changing nothing, if a process works on it."""
        return self._remove(reference, everywhere=False)

    def _remove(self, reference: str, everywhere: bool) -> bool:
        step, _, fingerprint = reference.partition("/")
        lease = Lease(self.lease_path(step, fingerprint))
        if not lease.acquire():
            return False
        try:
            if everywhere and self.remote is not None:
                self.remote.remove(step, fingerprint)
            self._bury(self.folder(step, fingerprint))
        finally:
            lease.release()
        self.sweep()
        return True

    def _bury(self, folder: Path) -> None:
        (self.root / _REMOVED).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it was not here, or a rival removed it
            folder.rename(self.root / _REMOVED / f"{folder.name}-{secrets.token_hex(4)}")

    def leftovers(self, before: float) -> list[str]:
        """`step/name` of folders without a manifest that nobody works on and nothing was written to since a time."""
        working = self.in_work()
        found = []
        for step in self.steps():
            for folder in (self.root / step).iterdir():
                fingerprint = folder.name.lstrip(".").partition(_PULLED)[0]
                if folder.is_dir() and not (folder / MANIFEST).exists() and f"{step}/{fingerprint}" not in working:
                    found += [f"{step}/{folder.name}"] if _last_change(folder) < before else []
        return sorted(found)

    def sweep(self) -> None:
        """Deletes what was removed, also by a process that was killed at it."""
        for grave in (self.root / _REMOVED).glob("*"):
            shutil.rmtree(grave, ignore_errors=True)

    def set_alias(self, name: str, version: str, artifact: Artifact) -> None:
        """Points `name@version` at an artifact, replacing what it pointed at; in the shared root too."""
        if self.remote is not None:
            self.remote.set_alias(f"{name}@{version}", artifact.reference)
        write_text(self._home.aliases / f"{name}@{version}", artifact.reference + "\n")

    def drop_alias(self, alias: str) -> None:
        """Forgets `name@version`, also in the shared root; the artifact stays. Raises InputError if there is none."""
        known = self._every_alias()
        if alias not in known:
            raise InputError(f"no alias {alias!r}", nearest(alias, known))
        if self.remote is not None:
            self.remote.drop_alias(alias)
        try:
            (self._home.aliases / alias).unlink(missing_ok=True)
        except OSError as error:
            where = self._home.aliases / alias
            raise InputError(f"{where}: {error.strerror}", "what lies there is no alias: move it away") from error

    def aliases(self) -> dict[str, str]:
        """`name@version` -> `step/fingerprint`. Where both have one, the shared root's counts. Without damaged ones."""
        every = self._every_alias()
        return {name: target for name, target in every.items() if target}

    def damaged_aliases(self) -> list[str]:
        """The aliases that name no artifact: files that are empty, cut or something else."""
        return [name for name, target in self._every_alias().items() if not target]

    def _every_alias(self) -> dict[str, str]:
        """Damaged ones with an empty target."""
        here = {path.name: _target(path) for path in self._alias_files()}
        return here | (self.remote.aliases() if self.remote else {})

    def _alias_files(self) -> list[Path]:
        return sorted(self._home.aliases.glob("*@*"))

    def find(self, reference: str) -> Artifact:
        """An artifact by alias `name@version`, by `step/fingerprint` (a unique prefix is enough), or by its folder.

        Its files need not be here: see `fetch`. Raises InputError, and DamagedError for one that is damaged.
        """
        aliases = self.aliases()
        if "@" in reference and reference not in aliases and reference in self.damaged_aliases():
            raise InputError(
                f"alias {reference} is damaged: it names no artifact", f"moray artifacts unalias {reference}"
            )
        target = aliases.get(reference, reference)
        folder = Path(target).expanduser()
        if folder.is_absolute() or (folder / MANIFEST).is_file():
            step, fingerprint = folder.resolve().parts[-2:]
        else:
            step, _, fingerprint = target.partition("/")
        matches = {a.fingerprint: a for a in self._shared_of(step, fingerprint)} if fingerprint else {}
        matches |= {
            a.fingerprint: a for a in self.of_step(step) if fingerprint and a.fingerprint.startswith(fingerprint)
        }
        if len(matches) == 1:
            return next(iter(matches.values()))
        if matches:
            raise InputError(f"{reference!r} names {len(matches)} artifacts", "give more of the fingerprint")
        for damaged in self.damaged():
            if fingerprint and damaged.reference.startswith(f"{step}/{fingerprint}"):
                raise damaged
        known = [*aliases, *(f"{step}/..." for step in self.steps())]
        raise InputError(f"no artifact {reference!r}", nearest(reference, known))


def _target(path: Path) -> str:
    """What an alias's file names, or nothing."""
    try:
        target = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return target if REFERENCE.fullmatch(target) else ""


def _newest_first(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return sorted(artifacts, key=lambda a: a.manifest.started, reverse=True)


def _last_change(folder: Path) -> float:
    """When anything in a folder was last written, in seconds since the epoch."""
    try:
        paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
        return max(os.stat(path, follow_symlinks=False).st_mtime for path in [str(folder), *paths])
    except FileNotFoundError:  # somebody is at it
        return time.time()


def _shared_root(url: str) -> RemoteArtifacts | None:
    if not url:
        return None
    from moray.platform.store.remote import RemoteArtifacts

    return RemoteArtifacts(url)
