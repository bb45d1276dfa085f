"""Named aliases, `name@version` -> `step/fingerprint`: a file for each, here and in the shared root."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError, nearest
from moray.platform.store.manifest import REFERENCE

if TYPE_CHECKING:
    from moray.platform.store.remote import RemoteArtifacts


class Aliases:
    """The aliases under one folder, and those of the shared root if there is one."""

    def __init__(self, folder: Path, remote: RemoteArtifacts | None) -> None:
        self._folder, self._remote = folder, remote

    def set(self, name: str, version: str, reference: str) -> None:
        """Points `name@version` at `step/fingerprint`, replacing what it pointed at; in the shared root too."""
        if self._remote is not None:
            self._remote.set_alias(f"{name}@{version}", reference)
        write_text(self._folder / f"{name}@{version}", reference + "\n")

    def drop(self, alias: str) -> None:
        """Forgets `name@version`, also in the shared root; the artifact stays. Raises InputError if there is none."""
        known = self._every()
        if alias not in known:
            raise InputError(f"no alias {alias!r}", nearest(alias, known))
        if self._remote is not None:
            self._remote.drop_alias(alias)
        path = self._folder / alias
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}", "what lies there is no alias: move it away") from error

    def all(self) -> dict[str, str]:
        """`name@version` -> `step/fingerprint`. Where both have one, the shared root's counts. Without damaged ones."""
        return {alias: target for alias, target in self._every().items() if target}

    def damaged(self) -> list[str]:
        """The aliases that name no artifact: files that are empty, cut or something else."""
        return [alias for alias, target in self._every().items() if not target]

    def _every(self) -> dict[str, str]:
        """Damaged ones with an empty target."""
        here = {path.name: _target(path) for path in sorted(self._folder.glob("*@*"))}
        return here | (self._remote.aliases() if self._remote else {})


def _target(path: Path) -> str:
    """What an alias's file names, or nothing."""
    try:
        target = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return target if REFERENCE.fullmatch(target) else ""
