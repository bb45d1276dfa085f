"""The driver of one attempt, as a cluster starts it: `python -m moray.platform.control.attempt ATTEMPT_ID`.

Everything it needs lies in the attempt's run folder: `attempt.json`, which the controller wrote. What it prints goes to
`logs/driver.txt` there, what happens to `events/`, how it ended to `outcome.json`; all of it outlives the cluster. A
lease on the folder shows that it lives, and keeps a second start of the same attempt from doing anything.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moray.platform.core.atomic import create_bytes
from moray.platform.core.errors import MorayError
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.plan.step import Cancelled, Topology
from moray.platform.run.console import PlainConsole
from moray.platform.store.lease import Lease

_ALREADY = 3  # exit code: this attempt runs, or has ended


class AttemptOrder(BaseModel):
    """`attempt.json`: what to run, and on what. `ordered`: seconds of the monotonic clock, which `boot` began."""

    model_config = ConfigDict(frozen=True)

    source: str
    path: str
    folder: str
    overrides: tuple[str, ...]
    address: str
    cpus: int
    gpus: int
    memory_bytes: int
    ordered: float
    boot: str


class Outcome(BaseModel):
    """`outcome.json`: how an attempt ended, in its own words. `again`: whether another try could end otherwise."""

    model_config = ConfigDict(frozen=True)

    state: Literal["succeeded", "failed", "cancelled"]
    detail: str = ""
    again: bool = True


def lease_of(run: Path) -> Lease:
    """Held by the driver while it lives."""
    return Lease(run / "driver.lease")


def read_outcome(run: Path) -> Outcome | None:
    """How the attempt in this folder ended; None while it has not said so."""
    try:
        return Outcome.model_validate_json((run / "outcome.json").read_bytes())
    except FileNotFoundError:
        return None


def end_with(run: Path, outcome: Outcome) -> bool:
    """Says how an attempt ended; False if that has been said. The first word counts, the driver's or the controller's:
    an attempt that was given up cannot begin, or succeed, later.
    """
    return create_bytes(run / "outcome.json", outcome.model_dump_json(indent=2).encode() + b"\n")


def read_order(run: Path) -> AttemptOrder | None:
    """What the attempt in this folder was asked to do; None if it has not been asked yet."""
    try:
        return AttemptOrder.model_validate_json((run / "attempt.json").read_bytes())
    except FileNotFoundError:
        return None


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


def _execute(home: Home, run: Path, order: AttemptOrder, recipe: Any, console: PlainConsole) -> None:
    from moray.platform.run.runner import Runner
    from moray.platform.run.terminal import Terminal, closing_table

    attached: Any = importlib.import_module("moray.cluster.attached")
    topology = Topology(order.cpus, order.gpus, order.memory_bytes)
    cluster = attached.AttachedCluster(home, order.address, run / "logs" / "ray", topology)
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
