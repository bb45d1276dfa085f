"""How many rows of prompts a step reads while other sequences decode, whose next token waits for them."""

from __future__ import annotations

_SECONDS = 0.015  # of a step, for prompts
_LEAST, _FIRST = 16, 64  # rows: always, and before anything is known
_WEIGHT = 0.2  # of the newest measurement


class PromptPace:
    """Estimates the time of a prompt's row: that of a step, less that of steps without prompts, over the rows."""

    def __init__(self) -> None:
        self._without = 0.0
        self._row: float | None = None

    @property
    def rows(self) -> int:
        if self._row is None:
            return _FIRST
        return max(_LEAST, int(_SECONDS / self._row))

    def note(self, seconds: float, read: int) -> None:
        """A step took so long and read so many rows of prompts."""
        if not read:
            self._without = (1 - _WEIGHT) * self._without + _WEIGHT * seconds
            return
        row = max(seconds - self._without, 1e-9) / read
        self._row = row if self._row is None else (1 - _WEIGHT) * self._row + _WEIGHT * row
