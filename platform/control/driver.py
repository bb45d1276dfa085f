"""The driver of one attempt, as a cluster starts it: `python -m moray.platform.control.driver ATTEMPT_ID`.

Everything it needs lies in the attempt's run folder (attempt.py). What it prints goes to `logs/driver.txt` there, what
happens to `events/`, how it ended to `outcome.json`. The lease keeps a second start of the same attempt from doing
anything. Part of the composition root: a run meets the cluster that it was submitted to.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from moray.platform.control.attempt import AttemptOrder, Outcome, end_with, lease_of, read_outcome
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import Cancelled, MorayError
from moray.platform.core.home import Home
from moray.platform.plan.recipe import Recipe, parse_recipe
from moray.platform.run.console import PlainConsole

_ALREADY = 3  # exit code: this attempt runs, or has ended


def main(attempt: str) -> int:
    """Runs the attempt. Exit code: as `moray run`, or 3 if there is nothing for this process to do."""
    home = Home.from_environment()
    run = home.runs / attempt
    lease = lease_of(run)
    if read_outcome(run) is not None or not lease.acquire():
        return _ALREADY
    try:
        with _printing_to(run / "logs" / "driver.txt"):
            outcome, code = _run(home, run)
            end_with(run, outcome)
            return code
    finally:
        lease.release()


def _run(home: Home, run: Path) -> tuple[Outcome, int]:
    """Runs the recipe and says how it ended; a user's mistake is not worth another try."""
    console = PlainConsole(force_terminal=False, width=160)
    try:
        order = AttemptOrder.model_validate_json((run / "attempt.json").read_bytes())
        os.chdir(order.folder)
        recipe = parse_recipe(order.source, Path(order.path), order.overrides)
        _execute(home, run, order, recipe, console)
    except (Cancelled, KeyboardInterrupt):
        return Outcome(state="cancelled", detail="told to stop"), 130
    except MorayError as error:
        console.print(f"error: {error.message}", markup=False, soft_wrap=True)
        console.print(f"hint: {error.hint}" if error.hint else "", markup=False, soft_wrap=True)
        detail = error.message + (f" ({error.hint})" if error.hint else "")
        return Outcome(state="failed", detail=detail, again=error.exit_code != 2), error.exit_code
    except Exception as error:
        traceback.print_exc()
        return Outcome(state="failed", detail=f"{type(error).__name__}: {error}"), 1
    return Outcome(state="succeeded"), 0


def _execute(home: Home, run: Path, order: AttemptOrder, recipe: Recipe, console: PlainConsole) -> None:
    from moray.cluster.attached import AttachedCluster
    from moray.platform.run.runner import Runner
    from moray.platform.run.terminal import Terminal, closing_table

    topology = Topology(order.cpus, order.gpus, order.memory_bytes)
    cluster = AttachedCluster(home, order.address, run / "logs" / "ray", topology)
    with Terminal(console) as terminal:
        result = Runner(home, cluster, [terminal]).run(recipe, run.name)
    console.print(closing_table(result))


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Sends this process's stdout and stderr, and those of what it starts, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    yield
    sys.stdout.flush()
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
