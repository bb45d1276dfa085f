"""`moray runs`: past runs, their cost, and differences between two runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cyclopts import App

from moray.platform.run.console import Json, out, print_json, print_table

if TYPE_CHECKING:
    from moray.platform.run.history import RunRow

app = App(name="runs", help="List, show and compare past runs.", help_format="plaintext")


@app.command(name="list")
def list_runs_command(*, json_: Json = False) -> int:
    """List all runs, newest first."""
    from moray.platform.core.home import Home
    from moray.platform.run.history import list_runs

    runs = list_runs(Home.from_environment())
    if json_:
        print_json([_summary(run) for run in runs])
        return 0
    rows = [
        (run.run, run.recipe, run.state, _when(run.started), _took(run.seconds), str(run.made), str(run.reused))
        for run in runs
    ]
    print_table(("run", "recipe", "state", "started", "time>", "made>", "reused>"), rows)
    return 0


@app.command(name="show")
def show_run(run: str, /, *, json_: Json = False) -> int:
    """Show the steps of a run: time, core-hours, GPU-hours, artifact and outcome.

    RUN is a run's name or a unique part of it.
    """
    from moray.platform.core.home import Home
    from moray.platform.run.history import find_run

    found = find_run(Home.from_environment(), run)
    steps = list(found.steps.values())
    cores, gpus = sum(step.core_hours for step in steps), sum(step.gpu_hours for step in steps)
    if json_:
        totals = {"core_hours": cores, "gpu_hours": gpus}
        print_json(_summary(found) | totals | {"detail": found.detail, "steps": [asdict(step) for step in steps]})
        return 0
    out().print(f"{found.run}  {found.state}  {_when(found.started)}  {_took(found.seconds)}", markup=False)
    if found.detail:
        out().print(found.detail, markup=False)
    rows = [
        (
            step.step,
            step.state,
            _took(step.seconds) if step.seconds else "-",
            f"{step.core_hours:.4f}",
            f"{step.gpu_hours:.4f}",
            step.artifact or "-",
            step.outcome,
        )
        for step in steps
    ]
    rows.append(("total", "", "", f"{cores:.4f}", f"{gpus:.4f}", "", ""))
    print_table(("step", "state", "time>", "core-hours>", "GPU-hours>", "artifact", "outcome"), rows)
    return 0


@app.command
def diff(a: str, b: str, /, *, json_: Json = False) -> int:
    """Compare two runs: steps with different fingerprints, config differences by field, metrics side by side."""
    from moray.platform.core.home import Home
    from moray.platform.run.history import diff_runs, find_run

    home = Home.from_environment()
    old, new = find_run(home, a), find_run(home, b)
    found = diff_runs(home, old, new)
    if json_:
        metrics = [{"step": step, "name": name, "a": x, "b": y} for (step, name), (x, y) in found.metrics.items()]
        changed = [asdict(change) for change in found.changed]
        print_json({"a": old.run, "b": new.run, "same": list(found.same), "changed": changed, "metrics": metrics})
        return 0
    out().print(f"a  {old.run}\nb  {new.run}\nsame  {', '.join(found.same) or 'none'}", markup=False)
    steps = []
    for change in found.changed:
        steps.append((change.step, "fingerprint", change.old[:8] or "-", change.new[:8] or "-"))
        steps += [(change.step, d.field, f"{d.old!r:.60}", f"{d.new!r:.60}") for d in change.config]
    if steps:
        print_table(("step", "field", "a", "b"), steps)
    differing = [(step, name, x, y) for (step, name), (x, y) in found.metrics.items() if x != y]
    if differing:
        out().print()
        print_table(("step", "metric", "a>", "b>"), [(s, name, _value(x), _value(y)) for s, name, x, y in differing])
    return 0


def _summary(run: RunRow) -> dict[str, Any]:
    return {
        "run": run.run,
        "recipe": run.recipe,
        "state": run.state,
        "started": run.started,
        "seconds": run.seconds,
        "made": run.made,
        "reused": run.reused,
    }


def _when(started: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "-"


def _took(value: float | None) -> str:
    from moray.platform.run.terminal import seconds

    return "-" if value is None else seconds(value)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:,.6g}"
