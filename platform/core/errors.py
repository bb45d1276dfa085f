"""Errors shown to users: one `error:` line with the location and the problem, one `hint:` line with the fix.

A `MorayError` is written for users. Any other exception that escapes is a bug in Moray and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MorayError(Exception):
    """An error outside Moray's code. `message` gives the location and the problem, `hint` the fix.

    `exit_code` is 2 for bad input (nothing was started), 1 for a run that failed after it started.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[MorayError], tuple[str, str]]:
        # Ray pickles errors between processes; the default would lose the hint.
        return type(self), (self.message, self.hint)


class RecipeError(MorayError):
    """A recipe that cannot be read, or that refers to something that does not exist."""


class InputError(MorayError):
    """A file, folder, artifact or value given by the user that is missing or unusable."""


class StoreUnreachableError(InputError):
    """The store does not respond, or reports a failure of its own. It may work again."""


class StoreRefusedError(InputError):
    """The store answers, but refuses a request for a reason that repeating it does not change: no right, no room."""


class UnavailableError(MorayError):
    """Something that a request needs does not respond. It may again."""

    exit_code = 1


class StepFailed(MorayError):
    """A step failed after it started. Completed work is kept; a rerun resumes from it."""

    exit_code = 1


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns a hint with the option closest to `name`, or with all options if none is close."""
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none exist"


class Cancelled(Exception):
    """Raised inside a step after the user stopped the run."""
