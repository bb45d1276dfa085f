"""Decides the next state of an attempt and of its job. Pure functions, called in every round of the controller.

They use three sources: the attempt's `outcome.json`, which overrides the others; the driver's lease, which shows that
the driver is alive; and the cluster, which may report a dead driver as running indefinitely or may not list it at all.
docs/states.md shows the states. An attempt that ends without an outcome and without a stop request is lost, not failed.
Lost attempts are retried on a separate budget; the job fails when that budget is used up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moray.platform.control.attempt import Outcome
from moray.platform.control.jobs import ATTEMPT_ENDED, Attempt, AttemptState, Job
from moray.platform.core.cluster import Observed

LOSSES = 5  # retries after lost attempts, independent of the job's `retries`
START_SECONDS = 120.0  # longest time from submission until the driver takes its lease
SILENT_SECONDS = 10.0  # a driver whose lease has been free for this long is lost
STOP_SECONDS = 60.0  # interval between stop requests to the same driver
_SHORTEST_BACKOFF, _LONGEST_BACKOFF = 2.0, 60.0


@dataclass(frozen=True)
class AttemptObservation:
    """Everything known about an attempt at one moment. Durations are in seconds of the monotonic clock.

    observed: the cluster's report; None if the cluster does not list the attempt. alive: the driver holds its lease.
    was_alive: the driver has held its lease before. silent: time since the driver was last seen alive, or since the
    attempt was submitted. since_stop: time since the last stop request; None if there was none.
    """

    observed: Observed | None
    alive: bool
    was_alive: bool
    outcome: Outcome | None
    silent: float
    since_stop: float | None = None


@dataclass(frozen=True)
class AttemptAction:
    """Actions for one attempt: move it to `state`, submit it, send its driver a stop request."""

    state: AttemptState | None = None
    detail: str = ""
    submit: bool = False
    stop: bool = False
    retryable: bool = True  # for a failed attempt: a retry could succeed


def decide_attempt(job: Job, attempt: Attempt, seen: AttemptObservation) -> AttemptAction:
    """Returns the actions for one attempt that has not ended."""
    if seen.outcome is not None:
        return _ended(job, seen.outcome)
    if seen.alive:
        return _alive(job, attempt, seen)
    if attempt.state == "created":
        if job.stop_requested and seen.observed is None:
            return AttemptAction("cancelled", "stopped before it was submitted")
        return AttemptAction(submit=True)
    return _silent(job, seen)


def _ended(job: Job, outcome: Outcome) -> AttemptAction:
    if outcome.state == "succeeded":
        return AttemptAction("succeeded")
    if job.stop_requested:
        return AttemptAction("cancelled", "stopped")
    if outcome.state == "cancelled":
        return AttemptAction("lost", "the driver was stopped from outside Moray")
    return AttemptAction("failed", outcome.detail, retryable=outcome.again)


def _alive(job: Job, attempt: Attempt, seen: AttemptObservation) -> AttemptAction:
    state: AttemptState | None = None if attempt.state == "running" else "running"
    return AttemptAction(state, stop=job.stop_requested and _stop_due(seen))


def _silent(job: Job, seen: AttemptObservation) -> AttemptAction:
    """The attempt has no outcome and its lease is free: the driver has not started yet, or it is dead."""
    observed = seen.observed
    listed = observed is not None and observed.state in ("pending", "running")
    patience = SILENT_SECONDS if seen.was_alive or not listed else START_SECONDS
    if listed and job.stop_requested and _stop_due(seen):
        return AttemptAction(stop=True)
    if seen.silent < patience:
        return AttemptAction()
    if job.stop_requested:
        return AttemptAction("cancelled", "stopped", stop=listed)
    return AttemptAction("lost", _loss_reason(observed, seen.was_alive), stop=listed)


def _loss_reason(observed: Observed | None, was_alive: bool) -> str:
    if observed is None:
        return "the cluster no longer lists the attempt"
    if observed.state not in ("pending", "running"):
        return f"the driver ended without recording an outcome: {observed.detail or observed.state}"
    if was_alive:
        return "the driver died; the cluster still reports it as running"
    return f"the driver did not start within {START_SECONDS:.0f} s"


def _stop_due(seen: AttemptObservation) -> bool:
    """Whether to send a stop request: none was sent yet, or the last one is more than STOP_SECONDS old."""
    return seen.since_stop is None or seen.since_stop > STOP_SECONDS


@dataclass(frozen=True)
class JobTransition:
    """The job's state after one of its attempts has ended. `delay`: seconds until the next attempt may start."""

    state: Literal["queued", "succeeded", "failed", "cancelled"]
    reason: str = ""
    delay: float = 0.0


def decide_job(job: Job, ended: AttemptState, detail: str, retryable: bool) -> JobTransition:
    """Returns the job's transition when its latest attempt ends in state `ended`.

    `job.attempts` may or may not contain that final state yet.
    """
    if ended not in ATTEMPT_ENDED:
        raise ValueError(f"{ended} is not a final state of an attempt")
    if ended in ("succeeded", "cancelled"):
        return JobTransition("succeeded" if ended == "succeeded" else "cancelled", detail)
    if job.stop_requested:
        return JobTransition("cancelled", "stopped")
    same = 1 + sum(attempt.state == ended for attempt in job.attempts[:-1])
    budget = LOSSES if ended == "lost" else (job.retries if retryable else 0)
    if same > budget:
        return JobTransition("failed", detail if ended == "failed" else f"lost {same} times, most recently: {detail}")
    delay = min(_LONGEST_BACKOFF, _SHORTEST_BACKOFF * 2 ** (same - 1))
    return JobTransition("queued", f"attempt {len(job.attempts)} {ended}: {detail}", delay)
