"""Selects the queued jobs that start now: pure functions over job rows.

At most `slots` attempts are in flight. Priority order is production, interactive, batch; within a priority the oldest
job starts first. A retry waits for its back-off. An exclusive job (from a schedule with overlap `queue`) waits until
all earlier jobs of its schedule have ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from moray.platform.control.jobs import IN_FLIGHT, PRIORITIES, Job


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """The queued jobs in the order in which they start."""
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
    """The jobs to start now, out of `jobs`, all jobs that have not ended."""
    free = slots - sum(job.state in IN_FLIGHT for job in jobs)
    ready = [job for job in in_order(jobs) if job.not_before <= now and blocker(job, jobs) is None]
    return ready[: max(0, free)]


def why_waiting(job: Job, jobs: Sequence[Job], slots: int, now: float) -> list[str]:
    """Reasons why a queued job has not started, as text for `moray why` and the page."""
    lines = []
    if job.reason:
        lines.append(job.reason)
    if job.not_before > now:
        lines.append(f"retry in {job.not_before - now:.0f} s")
    first = blocker(job, jobs)
    if first is not None:
        lines.append(f"waiting for {first.id} of the same schedule ({first.state}), because overlap is `queue`")
    in_flight = [other for other in jobs if other.state in IN_FLIGHT]
    if len(in_flight) >= slots:
        names = ", ".join(other.id for other in in_flight)
        lines.append(f"{len(in_flight)} of {slots} slots in use: {names}")
    ahead = [other.id for other in in_order(jobs)].index(job.id)
    if ahead:
        lines.append(f"{ahead} {'job' if ahead == 1 else 'jobs'} ahead in the queue (priority {job.priority})")
    return lines or ["next in the queue; it starts within seconds"]
