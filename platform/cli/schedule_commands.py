"""`moray schedule`: recipes that run at times; docs/schedules.md has the rules."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cyclopts import App, Parameter

from moray.platform.cli.parameters import Overrides
from moray.platform.control.choices import Catchup, Overlap, Priority
from moray.platform.run.console import Json, out, print_json, print_table

app = App(name="schedule", help="Run recipes at times, by cron or at intervals.", help_format="plaintext")

Cron = Annotated[str | None, Parameter(help='five fields, as in "0 2 * * *", or @daily')]
EveryText = Annotated[str | None, Parameter(name="--every", help="30m, 6h, 1d, 1h30m")]
Tz = Annotated[str | None, Parameter(help="time zone, as in Asia/Singapore (default: this machine's)")]
OverlapChoice = Annotated[Overlap, Parameter(help="what a tick does while an earlier job of it has not ended")]
CatchupChoice = Annotated[
    Catchup, Parameter(help="which of the ticks that were missed while nothing was running still runs")
]
_MOST_TICKS = 10


@app.command
def add(
    name: str,
    recipe: str,
    /,
    *,
    cron: Cron = None,
    every: EveryText = None,
    tz: Tz = None,
    set_: Overrides = None,
    priority: Priority = "batch",
    retries: int = 0,
    overlap: OverlapChoice = "skip",
    catchup: CatchupChoice = "none",
    json_: Json = False,
) -> int:
    """Add a schedule NAME that submits RECIPE, as it is written now, at every tick."""
    from moray.platform.client import Client, read_submission

    asked = read_submission(recipe, set_ or []) | {
        "name": name, "cron": cron, "every": every, "tz": tz or local_zone(), "priority": priority, "retries": retries,
        "overlap": overlap, "catchup": catchup,
    }  # fmt: skip
    added = Client.from_environment().post("/api/schedules", asked)
    if json_:
        print_json(added)
        return 0
    out().print(f"{added['name']}: {_reading(added)}", markup=False)
    out().print(f"next {_moment(added['next'], added['tz'])}", markup=False)
    return 0


@app.command(name="list")
def list_schedules(*, json_: Json = False) -> int:
    """Every schedule, with its next tick and what became of the latest."""
    from moray.platform.client import Client

    found = Client.from_environment().get("/api/schedules")
    if json_:
        print_json(found)
        return 0
    rows = []
    for row in found:
        latest = _outcome(row["ticks"][0]) if row["ticks"] else "-"
        rows.append((row["name"], row["recipe"], _reading(row), _next(row), latest))
    print_table(("schedule", "recipe", "when", "next", "latest tick"), rows)
    return 0


@app.command(name="show")
def show_schedule(name: str, /, *, json_: Json = False) -> int:
    """One schedule and what became of its latest ticks."""
    from moray.platform.client import Client

    found = Client.from_environment().get(_path(name))
    if json_:
        print_json(found)
        return 0
    facts = {
        "recipe": " ".join([found["recipe"], *(f"--set {text}" for text in found["set"])]), "when": _reading(found),
        "next": _next(found), "overlap": found["overlap"], "catchup": found["catchup"], "priority": found["priority"],
        "retries": str(found["retries"]), "added": _moment(found["created"], found["tz"]),
    }  # fmt: skip
    out().print(found["name"], style="bold", markup=False)
    for label, value in facts.items():
        out().print(f"  {label:<9} {value}", markup=False)
    if found["ticks"]:
        out().print()
        rows = [(_span(tick, found["tz"]), str(tick["count"]), _outcome(tick)) for tick in found["ticks"][:_MOST_TICKS]]
        print_table(("tick", "ticks>", "outcome"), rows)
    return 0


@app.command(name="next")
def next_(name: str, /, *, n: Annotated[int, Parameter(name=["-n", "--n"])] = 5, json_: Json = False) -> int:
    """The next N ticks, in the schedule's time zone."""
    from moray.platform.client import Client

    found = Client.from_environment().get(f"{_path(name)}/next", n=n)
    if json_:
        print_json(found)
        return 0
    out().print(found["english"], markup=False)
    if found["paused"]:
        out().print(f"paused: none of these runs before `moray schedule resume {name}`", markup=False)
    for row in found["ticks"]:
        out().print(f"  {_moment(row['tick'], found['tz'])}", markup=False)
    return 0


@app.command
def pause(name: str, /, *, json_: Json = False) -> int:
    """Skip every tick from now on."""
    return _change(name, "pause", json_)


@app.command
def resume(name: str, /, *, json_: Json = False) -> int:
    """Tick again; what came while it was paused stays skipped."""
    return _change(name, "resume", json_)


@app.command(name="rm")
def remove_schedule(name: str, /, *, json_: Json = False) -> int:
    """Forget a schedule; its jobs stay."""
    from moray.platform.client import Client

    Client.from_environment().delete(_path(name))
    if json_:
        print_json({"removed": name})
    else:
        out().print(f"removed {name}; its jobs stay", markup=False)
    return 0


def local_zone() -> str:
    """The name of this machine's time zone, UTC where it has none."""
    linked = str(Path("/etc/localtime").resolve()).partition("zoneinfo/")[2]
    for name in (os.environ.get("TZ", "").lstrip(":"), linked):
        try:
            return ZoneInfo(name).key
        except (ZoneInfoNotFoundError, ValueError, OSError):
            continue
    return "UTC"


def _change(name: str, action: str, json_: bool) -> int:
    from moray.platform.client import Client

    changed = Client.from_environment().post(f"{_path(name)}/{action}")
    if json_:
        print_json(changed)
    else:
        out().print(f"{changed['name']}: {_next(changed)}", markup=False)
    return 0


def _path(name: str) -> str:
    from urllib.parse import quote

    return f"/api/schedules/{quote(name, safe='')}"


def _reading(row: dict[str, Any]) -> str:
    """When it ticks, in English; an interval's zone only decides how its times are shown."""
    return str(row["english"]) if row["cron"] else f"{row['english']} (times in {row['tz']})"


def _next(row: dict[str, Any]) -> str:
    return "paused" if row["paused"] else _moment(row["next"], row["tz"])


def _outcome(tick: dict[str, Any]) -> str:
    return f"run {tick['job']}" if tick["outcome"] == "run" else f"skipped: {tick['reason']}"


def _span(tick: dict[str, Any], tz: str) -> str:
    first, last = _wall(tick["tick"], tz), _wall(tick["until"], tz)
    return first if tick["count"] == 1 else f"{first} ... {last}"


def _moment(moment: float | None, tz: str) -> str:
    """An instant on the wall clock of `tz`, and how far off it is."""
    if moment is None:
        return "-"
    ahead = moment - time.time()
    return f"{_wall(moment, tz)} ({f'in {_duration(ahead)}' if ahead >= 0 else f'{_duration(-ahead)} ago'})"


def _wall(moment: float, tz: str) -> str:
    zone: tzinfo = UTC  # where the controller knows the zone and this machine does not; what is shown says so
    with contextlib.suppress(ZoneInfoNotFoundError, ValueError, OSError):
        zone = ZoneInfo(tz)
    return datetime.fromtimestamp(moment, zone).strftime("%a %Y-%m-%d %H:%M %Z")


def _duration(seconds: float) -> str:
    """3 d 4 h, 3 h 10 m, 12 m, 40 s: as fine as people plan."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} m"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} m"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
