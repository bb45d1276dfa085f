"""The HTTP routes of jobs: submit, list, show, stop, why, logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Response

from moray.platform.control.controller import Controller
from moray.platform.control.jobs import ENDED, JobState, Submission
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home

_PART = 256 << 10  # largest part of a log in one response, in bytes
_LONGEST_KEY = 200


def job_router(home: Home, controller: Controller) -> APIRouter:
    """Routes under /api/jobs, as documented in docs/http-api.md."""
    router = APIRouter(prefix="/api/jobs")
    jobs = controller.jobs

    @router.get("")
    def list_(
        state: Annotated[list[JobState], Query(default_factory=list)], limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> list[dict[str, Any]]:
        return [job.as_json() for job in jobs.list(state, limit)]

    @router.post("", status_code=201)
    def submit(
        submission: Annotated[Submission, Body()],
        response: Response,
        idempotency_key: Annotated[str | None, Header(max_length=_LONGEST_KEY)] = None,
    ) -> dict[str, Any]:
        controller.cluster(submission.cluster)
        job, new = jobs.submit(submission, key=idempotency_key)
        response.status_code = 201 if new else 200
        controller.wake()
        return job.as_json()

    @router.get("/{name}")
    def show(name: str) -> dict[str, Any]:
        return jobs.get(name).as_json()

    @router.get("/{name}/why")
    def why(name: str) -> dict[str, Any]:
        job = jobs.get(name)
        return {"id": job.id, "state": job.state, "lines": controller.why(job)}

    @router.post("/{name}/stop")
    def stop(name: str) -> dict[str, Any]:
        job = jobs.request_stop(name)
        controller.wake()
        return job.as_json()

    @router.get("/{name}/logs")
    def logs(name: str, attempt: int | None = None, offset: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        job = jobs.get(name)
        chosen = job.attempt(attempt)
        if chosen is None:
            return {"attempt": None, "text": "", "offset": offset, "ended": job.state in ENDED}
        # Read the state before the log: if the attempt has ended, the log read afterwards is complete.
        ended = chosen.ended is not None
        text, end, last = _part(home.runs / chosen.id / "logs" / "driver.txt", offset, ended)
        return {"attempt": chosen.number, "text": text, "offset": end, "ended": ended and last}

    return router


def _part(path: Path, offset: int, ended: bool) -> tuple[str, int, bool]:
    """Returns text from `offset`, its end offset, and whether that is the end of the file.

    While the log grows, only whole lines are returned.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if offset > size:
                raise InputError(f"offset {offset} is beyond the end of the log ({size} bytes)", "start again at 0")
            file.seek(offset)
            data = file.read(_PART)
    except FileNotFoundError:
        return "", offset, True
    last = offset + len(data) >= size
    if not (ended and last):
        whole = data.rfind(b"\n") + 1
        data = data[:whole] if whole or len(data) < _PART else _whole_characters(data)  # a line above the limit is cut
    return data.decode("utf-8", errors="replace"), offset + len(data), last


def _whole_characters(data: bytes) -> bytes:
    """Removes an incomplete UTF-8 character from the end of `data`."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if back < length else data
        if byte < 0x80:
            break
    return data
