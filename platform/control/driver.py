"""The driver of one attempt, started on the cluster as `python -m moray.platform.control.driver ATTEMPT_ID`.

The attempt's run folder (attempt.py) holds everything the driver needs. The driver writes its output to
`logs/driver.txt`, events to `events/` and its outcome to `outcome.json`. The lease makes a second start of the same
attempt exit at once. Part of the composition root, because it connects a run to the cluster it was submitted to.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from moray.platform.control.attempt import AttemptOrder, Outcome, lease_of, read_outcome, record_outcome
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import Cancelled, MorayError
from moray.platform.core.home import Home
from moray.platform.plan.recipe import Recipe, parse_recipe
from moray.platform.run.console import PlainConsole

_ALREADY = 3  # exit code: another driver runs this attempt, or the attempt has ended


def main(attempt: str) -> int:
    """Runs the attempt. Exit code: as `moray run`, or 3 if the attempt is running elsewhere or has ended."""
    home = Home.from_environment()
    run = home.runs / attempt
    lease = lease_of(run)
    if not lease.acquire():
        return _ALREADY
    try:
        if read_outcome(run) is not None:  # checked under the lease: the controller may just have declared it lost
            return _ALREADY
        with _printing_to(run / "logs" / "driver.txt"):
            outcome, code = _run(home, run)
            record_outcome(run, outcome)
            return code
    finally:
        lease.release()


def _run(home: Home, run: Path) -> tuple[Outcome, int]:
    """Runs the recipe; returns its outcome and the exit code. User errors (exit 2) are not retried."""
    console = PlainConsole(force_terminal=False, width=160)
    try:
        order = AttemptOrder.model_validate_json((run / "attempt.json").read_bytes())
        os.chdir(order.folder)
        recipe = parse_recipe(order.source, Path(order.path), order.overrides)
        _execute(home, run, order, recipe, console)
    except (Cancelled, KeyboardInterrupt):
        return Outcome(state="cancelled", detail="stopped by a signal"), 130
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
    """Redirects stdout and stderr of this process and its children to a file."""
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
