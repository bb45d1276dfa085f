"""The artifact store on local disk: `<root>/<step>/<fingerprint>/` with its manifest, leases, and named aliases.

A folder without a manifest is work in progress or a leftover. The manifest is created, not replaced: if two writers
race, the first wins and both see the same artifact. An artifact is removed in one step too: its folder moves to
`.removed/` and is deleted there.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moray.platform.atomic import create_bytes, write_text
from moray.platform.errors import InputError, nearest
from moray.platform.home import Home
from moray.platform.lease import Lease, is_stale
from moray.platform.manifest import MANIFEST, Manifest


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and manifest."""

    folder: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def reference(self) -> str:
        return f"{self.manifest.step}/{self.manifest.fingerprint}"


_REMOVED = ".removed"


class ArtifactStore:
    """Artifacts and aliases under one MORAY_HOME."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.root = home.artifacts

    def folder(self, step: str, fingerprint: str) -> Path:
        return self.root / step / fingerprint

    def lease_path(self, step: str, fingerprint: str) -> Path:
        return self.root / step / f".{fingerprint}.lease"

    def get(self, step: str, fingerprint: str) -> Artifact | None:
        """The artifact, or None if it has no (whole) manifest."""
        folder = self.folder(step, fingerprint)
        try:
            text = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None
        return Artifact(folder, Manifest.model_validate_json(text))

    def prepare(self, step: str, fingerprint: str, keep_leftovers: bool) -> Path:
        """The folder to work in, empty unless leftovers of a killed attempt are to be gone on from."""
        folder = self.folder(step, fingerprint)
        if folder.exists() and not keep_leftovers:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, manifest: Manifest) -> Artifact:
        """Writes the manifest, last of all. If another writer was first, its artifact is returned."""
        folder = self.folder(manifest.step, manifest.fingerprint)
        create_bytes(folder / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
        committed = self.get(manifest.step, manifest.fingerprint)
        assert committed is not None
        return committed

    def of_step(self, step: str) -> Iterator[Artifact]:
        """All finished artifacts of a step, newest first."""
        found = [a for path in (self.root / step).glob(f"*/{MANIFEST}") if (a := self.get(step, path.parent.name))]
        yield from sorted(found, key=lambda a: a.manifest.started, reverse=True)

    def steps(self) -> list[str]:
        """The steps that have a folder here."""
        return sorted(path.name for path in self.root.glob("*") if path.is_dir() and path.name != _REMOVED)

    def all(self) -> Iterator[Artifact]:
        """All finished artifacts, by step, newest first."""
        for step in self.steps():
            yield from self.of_step(step)

    def by_fingerprint(self, fingerprint: str) -> Artifact | None:
        """The artifact with this whole fingerprint, whatever its step."""
        return next((a for step in self.steps() if (a := self.get(step, fingerprint))), None)

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
        """Deletes `step/fingerprint`; False, changing nothing, if a living process works on it."""
        step, _, fingerprint = reference.partition("/")
        lease = Lease(self.lease_path(step, fingerprint))
        if not lease.acquire():
            return False
        try:
            (self.root / _REMOVED).mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a rival removed it
                self.folder(step, fingerprint).rename(self.root / _REMOVED / f"{fingerprint}-{secrets.token_hex(4)}")
        finally:
            lease.release()
        self.sweep()
        return True

    def sweep(self) -> None:
        """Deletes what was removed, also by a process that was killed at it."""
        for grave in (self.root / _REMOVED).glob("*"):
            shutil.rmtree(grave, ignore_errors=True)

    def set_alias(self, name: str, version: str, artifact: Artifact) -> None:
        """Points `name@version` at an artifact, replacing what it pointed at."""
        write_text(self._home.aliases / f"{name}@{version}", artifact.reference + "\n")

    def aliases(self) -> dict[str, str]:
        """`name@version` -> `step/fingerprint`."""
        return {path.name: path.read_text().strip() for path in sorted(self._home.aliases.glob("*@*"))}

    def find(self, reference: str) -> Artifact:
        """An artifact by alias `name@version`, by `step/fingerprint` (a unique prefix is enough), or by its folder."""
        aliases = self.aliases()
        target = aliases.get(reference, reference)
        folder = Path(target).expanduser()
        if folder.is_absolute() or (folder / MANIFEST).is_file():
            step, fingerprint = folder.resolve().parts[-2:]
        else:
            step, _, fingerprint = target.partition("/")
        matches = [a for a in self.of_step(step) if fingerprint and a.fingerprint.startswith(fingerprint)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise InputError(f"{reference!r} names {len(matches)} artifacts", "give more of the fingerprint")
        known = [*aliases, *(f"{step}/..." for step in self.steps())]
        raise InputError(f"no artifact {reference!r}", nearest(reference, known))
