"""Named aliases, `name@version` -> `step/fingerprint`, one file each, on this machine and in the shared root."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError, nearest
from moray.platform.store.manifest import REFERENCE

if TYPE_CHECKING:
    from moray.platform.store.remote import RemoteArtifacts

# Versions of a model: registered last; approved by the step `deploy`; live in the deployment of this name.
NEWEST, APPROVED, DEPLOYED = "newest", "approved", "deployed"


class Aliases:
    """The aliases in one folder, and those of the shared root if there is one."""

    def __init__(self, folder: Path, remote: RemoteArtifacts | None) -> None:
        self._folder, self._remote = folder, remote

    def set(self, name: str, version: str, reference: str) -> None:
        """Points `name@version` at `step/fingerprint`, replacing an earlier target; in the shared root too."""
        if self._remote is not None:
            self._remote.set_alias(f"{name}@{version}", reference)
        write_text(self._folder / f"{name}@{version}", reference + "\n")

    def drop(self, alias: str) -> None:
        """Removes `name@version`, also in the shared root; keeps the artifact. Raises InputError if it is unknown."""
        known = self._all()
        if alias not in known:
            raise InputError(f"unknown alias {alias!r}", nearest(alias, known))
        if self._remote is not None:
            self._remote.drop_alias(alias)
        path = self._folder / alias
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}", "the path is not an alias file: move it away") from error

    def all(self) -> dict[str, str]:
        """Returns `name@version` -> `step/fingerprint`, without damaged ones; the shared root overrides local ones."""
        return {alias: target for alias, target in self._all().items() if target}

    def damaged(self) -> list[str]:
        """Returns the aliases without a valid target: empty, truncated or foreign files."""
        return [alias for alias, target in self._all().items() if not target]

    def _all(self) -> dict[str, str]:
        """All aliases; damaged ones have an empty target."""
        local = {path.name: _target(path) for path in sorted(self._folder.glob("*@*"))}
        return local | (self._remote.aliases() if self._remote else {})


def _target(path: Path) -> str:
    """The target in an alias file, or "" if it is invalid."""
    try:
        target = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return target if REFERENCE.fullmatch(target) else ""
