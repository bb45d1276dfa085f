"""What becomes of an attempt, given everything that is known of it: a pure function, applied again and again.

Three witnesses: the attempt's own `outcome.json`, which has the last word; its lease, which shows that the driver
lives; and the cluster, which may call a dead driver running for ever, or not know it at all. docs/states.md draws the
states. An attempt that ended without saying how, and that nobody asked to stop, is lost, not failed: the job is tried
again on a budget of its own, and only then fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moray.platform.control.attempt import Outcome
from moray.platform.control.jobs import ATTEMPT_ENDED, Attempt, AttemptState, Job
from moray.platform.core.cluster import Observed

LOSSES = 5  # how often a job is tried again after its attempts were lost, whatever its own retries
START_SECONDS = 120.0  # from submission to the driver's first sign of life
DOUBT_SECONDS = 10.0  # how long a driver without a sign of life is given the benefit of the doubt
STOP_SECONDS = 60.0  # after so long a driver that was told to stop is told again
_SHORTEST_BACKOFF, _LONGEST_BACKOFF = 2.0, 60.0


@dataclass(frozen=True)
class Sight:
    """What is known of an attempt now. Durations are by a clock that does not jump.

    observed: what the cluster says, None if it does not know it. alive: the driver's lease is held.
    met: the driver was alive once. silent: seconds since it was last seen alive, or since it was submitted.
    """

    observed: Observed | None
    alive: bool
    met: bool
    outcome: Outcome | None
    silent: float
    since_stop: float | None = None  # since it was last told to stop


@dataclass(frozen=True)
class AttemptAction:
    """What to do: move the attempt to a state, submit it, tell its driver to stop."""

    state: AttemptState | None = None
    detail: str = ""
    submit: bool = False
    stop: bool = False
    again: bool = True  # if it failed: another try could end otherwise


def judge_attempt(job: Job, attempt: Attempt, sight: Sight) -> AttemptAction:
    """Decides about one attempt that has not ended."""
    if sight.outcome is not None:
        return _of_outcome(job, sight.outcome)
    if sight.alive:
        return _of_living(job, attempt, sight)
    if attempt.state == "created":
        if job.stop_requested and sight.observed is None:
            return AttemptAction("cancelled", "stopped before it was submitted")
        return AttemptAction(submit=True)
    return _of_silent(job, attempt, sight)


def _of_outcome(job: Job, outcome: Outcome) -> AttemptAction:
    if outcome.state == "succeeded":
        return AttemptAction("succeeded")
    if job.stop_requested:
        return AttemptAction("cancelled", "stopped")
    if outcome.state == "cancelled":
        return AttemptAction("lost", "its driver was told to stop, by nobody here")
    return AttemptAction("failed", outcome.detail, again=outcome.again)


def _of_living(job: Job, attempt: Attempt, sight: Sight) -> AttemptAction:
    moved: AttemptState | None = None if attempt.state == "running" else "running"
    return AttemptAction(moved, stop=job.stop_requested and _told_long_ago(sight))


def _of_silent(job: Job, attempt: Attempt, sight: Sight) -> AttemptAction:
    """No outcome and no sign of life: it has not begun, or it is dead."""
    observed = sight.observed
    waiting = observed is not None and observed.state in ("pending", "running")
    patience = DOUBT_SECONDS if sight.met or not waiting else START_SECONDS
    if waiting and job.stop_requested and _told_long_ago(sight):
        return AttemptAction(stop=True)
    if sight.silent < patience:
        return AttemptAction()
    if job.stop_requested:
        return AttemptAction("cancelled", "stopped", stop=waiting)
    return AttemptAction("lost", _loss(observed, sight.met), stop=waiting)


def _loss(observed: Observed | None, met: bool) -> str:
    if observed is None:
        return "the cluster does not know it any more"
    if observed.state not in ("pending", "running"):
        return f"its driver ended without a word: {observed.detail or observed.state}"
    if met:
        return "its driver is gone, though the cluster calls it running"
    return f"its driver did not start within {START_SECONDS:.0f} s"


def _told_long_ago(sight: Sight) -> bool:
    return sight.since_stop is None or sight.since_stop > STOP_SECONDS


@dataclass(frozen=True)
class NextStep:
    """What becomes of the job after an attempt has ended. `delay`: seconds until it may be tried again."""

    state: Literal["queued", "succeeded", "failed", "cancelled"]
    reason: str = ""
    delay: float = 0.0


def after(job: Job, ended: AttemptState, detail: str, again: bool) -> NextStep:
    """Decides about the job of an attempt that ends now in `ended`. `job.attempts` may or may not show that yet."""
    if ended not in ATTEMPT_ENDED:
        raise ValueError(f"{ended} is not the end of an attempt")
    if ended in ("succeeded", "cancelled"):
        return NextStep("succeeded" if ended == "succeeded" else "cancelled", detail)
    if job.stop_requested:
        return NextStep("cancelled", "stopped")
    same = 1 + sum(attempt.state == ended for attempt in job.attempts[:-1])
    budget = LOSSES if ended == "lost" else (job.retries if again else 0)
    if same > budget:
        return NextStep("failed", detail if ended == "failed" else f"lost {same} times; the last time: {detail}")
    delay = min(_LONGEST_BACKOFF, _SHORTEST_BACKOFF * 2 ** (same - 1))
    return NextStep("queued", f"attempt {len(job.attempts)} {ended}: {detail}", delay)
