"""How many rows of prompts a step reads while other sequences decode, whose next token waits for them."""

from __future__ import annotations

_SECONDS = 0.015  # of a step, for prompts; or as long as the step takes without them
_LEAST, _FIRST = 16, 64  # rows: always, and before anything is known
_WEIGHT = 0.2  # of the newest measurement


class PromptPace:
    """Estimates the time of a prompt's row: that of a step, less that of steps without prompts, over the rows."""

    def __init__(self) -> None:
        self._without: float | None = None
        self._row: float | None = None

    @property
    def rows(self) -> int:
        if self._row is None:
            return _FIRST
        return max(_LEAST, int(max(_SECONDS, self._without or 0.0) / self._row))

    def note(self, seconds: float, read: int) -> None:
        """A step took so long and read so many rows of prompts."""
        if not read:
            self._without = _average(self._without, seconds)
        else:
            self._row = _average(self._row, max(seconds - (self._without or 0.0), 1e-9) / read)


def _average(before: float | None, value: float) -> float:
    return value if before is None else (1 - _WEIGHT) * before + _WEIGHT * value
