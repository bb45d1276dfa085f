"""Pins: what keeps artifacts, and what they were made from, out of `gc`: an empty file `<step>/<fingerprint>` each."""

from __future__ import annotations

from pathlib import Path

from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError, nearest


class Pins:
    """The pins under one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, reference: str) -> None:
        """Pins `step/fingerprint`."""
        write_text(self._folder / reference, "")

    def drop(self, reference: str) -> None:
        """Raises InputError if it is not pinned."""
        if reference not in self.all():
            raise InputError(f"{reference} is not pinned", nearest(reference, self.all()))
        (self._folder / reference).unlink()

    def all(self) -> list[str]:
        """`step/fingerprint` of every pinned artifact."""
        return sorted(path.relative_to(self._folder).as_posix() for path in self._folder.glob("*/[!.]*"))
