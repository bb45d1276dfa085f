"""`moray schedule`: runs recipes on a schedule; docs/schedules.md has the rules."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cyclopts import App, Parameter

from moray.platform.cli.parameters import ClusterName, Overrides, UploadAnyway, transfer_progress
from moray.platform.control.choices import LOCAL, Catchup, Overlap, Priority
from moray.platform.run.console import Json, out, print_json, print_table

app = App(name="schedule", help="Run recipes on a schedule: cron or a fixed interval.", help_format="plaintext")

Cron = Annotated[str | None, Parameter(help='cron expression of five fields, for example "0 2 * * *", or @daily')]
EveryText = Annotated[str | None, Parameter(name="--every", help="interval: 30m, 6h, 1d, 1h30m")]
Tz = Annotated[str | None, Parameter(help="time zone, for example Asia/Singapore (default: this machine's)")]
OverlapChoice = Annotated[
    Overlap, Parameter(help="action at a tick while an earlier job of the schedule has not ended")
]
CatchupChoice = Annotated[
    Catchup, Parameter(help="which ticks to run after the control plane was down and missed some")
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
    retries: Annotated[int, Parameter(help="number of retries after a failed run")] = 0,
    overlap: OverlapChoice = "skip",
    catchup: CatchupChoice = "none",
    cluster: ClusterName = LOCAL,
    deadline: Annotated[
        str | None, Parameter(help="cancel a job that has not started this long after its tick: 2h")
    ] = None,
    yes: UploadAnyway = False,
    json_: Json = False,
) -> int:
    """Add a schedule NAME that submits RECIPE at every tick. Later edits of the recipe file have no effect.

    For another cluster than the local one, the files that it names are uploaded now, and later changes have no effect.
    """
    from moray.platform.client import Client, read_submission, stored_files

    body = read_submission(recipe, set_ or []) | {
        "name": name, "cron": cron, "every": every, "tz": tz or local_zone(), "priority": priority, "retries": retries,
        "overlap": overlap, "catchup": catchup, "deadline": deadline,
    }  # fmt: skip
    client = Client.from_environment()
    with transfer_progress() as progress:
        body |= stored_files(recipe, set_ or [], cluster, yes, progress)
    added = client.post("/api/schedules", body)
    if json_:
        print_json(added)
        return 0
    out().print(f"{added['name']}: {_timing(added)}", markup=False)
    out().print(f"next {_moment(added['next'], added['tz'])}", markup=False)
    return 0


@app.command(name="list")
def list_schedules(*, json_: Json = False) -> int:
    """List all schedules with their next tick and the outcome of the latest."""
    from moray.platform.client import Client

    found = Client.from_environment().get("/api/schedules")
    if json_:
        print_json(found)
        return 0
    rows = []
    for row in found:
        latest = _outcome(row["ticks"][0]) if row["ticks"] else "-"
        rows.append((row["name"], row["recipe"], _timing(row), _next(row), latest))
    print_table(("schedule", "recipe", "when", "next", "latest tick"), rows)
    return 0


@app.command(name="show")
def show_schedule(name: str, /, *, json_: Json = False) -> int:
    """Show a schedule and the outcomes of its latest ticks."""
    from moray.platform.client import Client

    found = Client.from_environment().get(_path(name))
    if json_:
        print_json(found)
        return 0
    facts = {
        "recipe": " ".join([found["recipe"], *(f"--set {text}" for text in found["set"])]), "when": _timing(found),
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
def next_(
    name: str, /, *, n: Annotated[int, Parameter(name=["-n", "--n"], help="number of ticks")] = 5, json_: Json = False
) -> int:
    """Show the next N ticks, in the schedule's time zone."""
    from moray.platform.client import Client

    found = Client.from_environment().get(f"{_path(name)}/next", n=n)
    if json_:
        print_json(found)
        return 0
    out().print(found["english"], markup=False)
    if found["paused"]:
        out().print(f"paused: no tick runs until `moray schedule resume {name}`", markup=False)
    for row in found["ticks"]:
        out().print(f"  {_moment(row['tick'], found['tz'])}", markup=False)
    return 0


@app.command
def pause(name: str, /, *, json_: Json = False) -> int:
    """Pause a schedule: skip all ticks from now on."""
    return _change(name, "pause", json_)


@app.command
def resume(name: str, /, *, json_: Json = False) -> int:
    """Resume a schedule. Ticks skipped while it was paused are not run."""
    return _change(name, "resume", json_)


@app.command(name="rm")
def remove_schedule(name: str, /, *, json_: Json = False) -> int:
    """Remove a schedule; its jobs are kept."""
    from moray.platform.client import Client

    Client.from_environment().delete(_path(name))
    if json_:
        print_json({"removed": name})
    else:
        out().print(f"removed {name}; its jobs are kept", markup=False)
    return 0


def local_zone() -> str:
    """The name of this machine's time zone, or UTC if it has none."""
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


def _timing(row: dict[str, Any]) -> str:
    """Describes when a schedule ticks; for an interval, the time zone only affects how times are shown."""
    return str(row["english"]) if row["cron"] else f"{row['english']} (times in {row['tz']})"


def _next(row: dict[str, Any]) -> str:
    return "paused" if row["paused"] else _moment(row["next"], row["tz"])


def _outcome(tick: dict[str, Any]) -> str:
    return f"run {tick['job']}" if tick["outcome"] == "run" else f"skipped: {tick['reason']}"


def _span(tick: dict[str, Any], tz: str) -> str:
    first, last = _wall(tick["tick"], tz), _wall(tick["until"], tz)
    return first if tick["count"] == 1 else f"{first} ... {last}"


def _moment(moment: float | None, tz: str) -> str:
    """Formats an instant as wall-clock time in `tz`, with the time until or since."""
    if moment is None:
        return "-"
    ahead = moment - time.time()
    return f"{_wall(moment, tz)} ({f'in {_duration(ahead)}' if ahead >= 0 else f'{_duration(-ahead)} ago'})"


def _wall(moment: float, tz: str) -> str:
    zone: tzinfo = UTC  # fallback if only the controller's machine knows the zone; the output shows UTC
    with contextlib.suppress(ZoneInfoNotFoundError, ValueError, OSError):
        zone = ZoneInfo(tz)
    return datetime.fromtimestamp(moment, zone).strftime("%a %Y-%m-%d %H:%M %Z")


def _duration(seconds: float) -> str:
    """Formats a duration with at most two units: 3 d 4 h, 3 h 10 m, 12 m, 40 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} m"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} m"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
