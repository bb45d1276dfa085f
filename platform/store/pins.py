"""Pins, which exclude artifacts and their ancestors from `gc`; each is an empty file `<step>/<fingerprint>`."""

from __future__ import annotations

from pathlib import Path

from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError, nearest


class Pins:
    """The pins in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, reference: str) -> None:
        """Pins `step/fingerprint`."""
        write_text(self._folder / reference, "")

    def drop(self, reference: str) -> None:
        """Removes a pin. Raises InputError if the artifact is not pinned."""
        if reference not in self.all():
            raise InputError(f"{reference} is not pinned", nearest(reference, self.all()))
        (self._folder / reference).unlink()

    def all(self) -> list[str]:
        """Returns `step/fingerprint` of every pinned artifact."""
        return sorted(path.relative_to(self._folder).as_posix() for path in self._folder.glob("*/[!.]*"))
