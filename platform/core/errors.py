"""What a user sees when something is wrong: one `error:` line that says where and what, one `hint:` line with the fix.

A `MorayError` is for people; anything else that escapes is a bug in Moray and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MorayError(Exception):
    """A mistake outside Moray's code. `message` says where and what, `hint` how to mend it.

    `exit_code` is 2 for bad input (nothing was started), 1 for a run that failed on the way.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[MorayError], tuple[str, str]]:
        # Errors cross process borders inside Ray; the default would lose the hint.
        return type(self), (self.message, self.hint)


class RecipeError(MorayError):
    """A recipe that cannot be read, or that names something which does not exist."""


class InputError(MorayError):
    """A file, folder, artifact or value given by the user that is missing or unusable."""


class StepFailed(MorayError):
    """A step stopped half-way. What it had finished is kept; a rerun goes on from there."""

    exit_code = 1


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint naming the option closest to `name`, or all of them when none is close."""
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "there are none"


class Cancelled(Exception):
    """Raised out of a step after the user asked the run to stop."""
