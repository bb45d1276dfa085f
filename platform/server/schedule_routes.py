"""The HTTP routes of schedules, as documented in docs/http-api.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter

from moray.platform.control.schedules import NewSchedule, Schedules
from moray.platform.control.ticks import local_text


def schedule_router(schedules: Schedules, check: Callable[[str], object], wake: Callable[[], None]) -> APIRouter:
    """Routes under `/api/schedules`. `check` raises InputError for an unknown cluster. `wake` starts a round of the
    controller when the next tick may have changed."""
    router = APIRouter(prefix="/api/schedules")

    @router.get("")
    def list_() -> list[dict[str, Any]]:
        return [schedules.as_json(schedule) for schedule in schedules.list()]

    @router.post("", status_code=201)
    def add(new: NewSchedule) -> dict[str, Any]:
        check(new.cluster)
        added = schedules.add(new)
        wake()
        return schedules.as_json(added)

    @router.get("/{name}")
    def show(name: str) -> dict[str, Any]:
        return schedules.as_json(schedules.get(name))

    @router.get("/{name}/next")
    def next_(name: str, n: int = 5) -> dict[str, Any]:
        schedule = schedules.get(name)
        ticks = [{"tick": tick, "local": local_text(tick, schedule.tz)} for tick in schedules.next(name, n)]
        return {"english": schedule.trigger.english(), "tz": schedule.tz, "paused": schedule.paused, "ticks": ticks}

    @router.post("/{name}/pause")
    def pause(name: str) -> dict[str, Any]:
        paused = schedules.pause(name)
        wake()
        return schedules.as_json(paused)

    @router.post("/{name}/resume")
    def resume(name: str) -> dict[str, Any]:
        resumed = schedules.resume(name)
        wake()
        return schedules.as_json(resumed)

    @router.delete("/{name}", status_code=204)
    def remove(name: str) -> None:
        schedules.remove(name)
        wake()

    return router
