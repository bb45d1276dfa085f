"""Which queued jobs start now: a decision over rows, touching nothing.

At most `slots` attempts are in flight. Of the jobs that may start, production goes before interactive before batch, and
within a class the one that waits longest. A retry waits for its back-off; an exclusive job (a schedule's, with overlap
`queue`) waits until the jobs of its schedule that came before it have ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from moray.platform.control.jobs import PRIORITIES, Job

IN_FLIGHT = ("starting", "running", "stopping")


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """The queued jobs, the next one first."""
    queued = [job for job in jobs if job.state == "queued"]
    return sorted(queued, key=lambda job: (PRIORITIES.index(job.priority), job.created, job.id))


def blocker(job: Job, jobs: Sequence[Job]) -> Job | None:
    """The unfinished job of the same schedule that an exclusive job waits for."""
    if not job.exclusive:
        return None
    earlier = [
        other
        for other in jobs
        if other.id != job.id
        and other.schedule == job.schedule
        and (other.state in IN_FLIGHT or (other.created, other.id) < (job.created, job.id))
    ]
    return min(earlier, key=lambda other: (other.created, other.id), default=None)


def choose_jobs(jobs: Sequence[Job], slots: int, now: float) -> list[Job]:
    """The jobs to start, of all that have not ended."""
    free = slots - sum(job.state in IN_FLIGHT for job in jobs)
    ready = [job for job in in_order(jobs) if job.not_before <= now and blocker(job, jobs) is None]
    return ready[: max(0, free)]


def why_waiting(job: Job, jobs: Sequence[Job], slots: int, now: float) -> list[str]:
    """Why a queued job has not started, for people."""
    lines = []
    if job.reason:
        lines.append(job.reason)
    if job.not_before > now:
        lines.append(f"it is tried again in {job.not_before - now:.0f} s")
    first = blocker(job, jobs)
    if first is not None:
        lines.append(f"it waits for {first.id} of the same schedule ({first.state}): overlap is `queue`")
    at_work = [other for other in jobs if other.state in IN_FLIGHT]
    if len(at_work) >= slots:
        names = ", ".join(other.id for other in at_work)
        lines.append(f"{len(at_work)} of {slots} slots are taken, by {names}")
    place = [other.id for other in in_order(jobs)].index(job.id)
    if place:
        lines.append(f"{place} {'job is' if place == 1 else 'jobs are'} before it in the queue ({job.priority})")
    return lines or ["it is next; it starts in a moment"]
