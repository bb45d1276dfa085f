"""The driver of one attempt, started on the cluster as `python -m moray.platform.control.driver ATTEMPT_ID`.

The attempt's files (attempt.py) hold everything the driver needs: in its run folder or, with `--store ADDRESS`, in the
store. The driver writes its output to `logs/driver.txt`, events to `events/` and its outcome to `outcome.json`. The
lease makes a second start of the same attempt exit at once. Part of the composition root, because it connects a run to
the cluster it was submitted to.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from moray.platform.control.attempt import AttemptFiles, AttemptOrder, LocalFiles, Outcome, StoredFiles
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import Cancelled, InputError, MorayError, StoreUnreachableError
from moray.platform.core.home import Home
from moray.platform.plan.recipe import Recipe, parse_recipe
from moray.platform.run.console import PlainConsole
from moray.platform.store.paths import StorePath, any_path
from moray.platform.store.segments import SegmentWriter

_ALREADY = 3  # exit code: another driver runs this attempt, or the attempt has ended


def main(attempt: str, store: str = "") -> int:
    """Runs the attempt. Exit code: as `moray run`, or 3 if the attempt is running elsewhere or has ended."""
    home = Home.from_environment()
    run = home.runs / attempt
    place = any_path(f"{store}/runs/{attempt}") if store else run
    stored = place if isinstance(place, StorePath) else None
    files = StoredFiles(stored, run) if stored else LocalFiles(run)
    lease = files.lease()
    if not lease.acquire():
        return _ALREADY
    try:
        if files.read_outcome() is not None:  # checked under the lease: the controller may just have declared it lost
            return _ALREADY
        with _printing_to(run / "logs" / "driver.txt"):
            outcome, code = _run(home, run, files, store)
        with _uploaded(run, stored):
            files.record_outcome(outcome)
        return code
    finally:
        lease.release()


def _run(home: Home, run: Path, files: AttemptFiles, store: str) -> tuple[Outcome, int]:
    """Runs the recipe; returns its outcome and the exit code. User errors (exit 2) are not retried."""
    console = PlainConsole(force_terminal=False, width=160)
    try:
        order = files.read_order()
        if order is None:
            raise InputError(f"attempt {run.name} has no order", "submit the job again")
        os.chdir(run if store else order.folder)  # with a store, the submitter's folder is one of another machine
        recipe = parse_recipe(order.source, Path(order.path), order.overrides)
        _execute(home, run, order, recipe, console, store)
    except (Cancelled, KeyboardInterrupt):
        return Outcome(state="cancelled", detail="stopped by a signal"), 130
    except MorayError as error:
        console.print(f"error: {error.message}", markup=False, soft_wrap=True)
        console.print(f"hint: {error.hint}" if error.hint else "", markup=False, soft_wrap=True)
        detail = error.message + (f" ({error.hint})" if error.hint else "")
        again = error.exit_code != 2 or isinstance(error, StoreUnreachableError)
        return Outcome(state="failed", detail=detail, again=again), error.exit_code
    except Exception as error:
        traceback.print_exc()
        return Outcome(state="failed", detail=f"{type(error).__name__}: {error}"), 1
    return Outcome(state="succeeded"), 0


def _execute(home: Home, run: Path, order: AttemptOrder, recipe: Recipe, console: PlainConsole, store: str) -> None:
    from moray.cluster.attached import AttachedCluster
    from moray.platform.run.runner import Runner
    from moray.platform.run.terminal import Terminal, closing_table

    topology = Topology(order.cpus, order.gpus, order.memory_bytes)
    leases = StorePath(store, ".leases") if store.startswith("s3://") else None
    address = order.address or os.environ.get("RAY_ADDRESS", "auto")
    cluster = AttachedCluster(home, address, run / "logs" / "ray", topology, leases)
    with Terminal(console) as terminal:
        result = Runner(home, cluster, [terminal]).run(recipe, run.name)
    console.print(closing_table(result))


@contextlib.contextmanager
def _uploaded(run: Path, stored: StorePath | None) -> Iterator[None]:
    """Uploads the rest of the run's events and logs before the block: nothing comes after the outcome."""
    if stored:
        SegmentWriter(run, stored).close()
    yield


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


def _arguments(given: Sequence[str]) -> tuple[str, str]:
    """The attempt's id and the address of the store."""
    attempt, *rest = given
    return attempt, rest[1] if rest[:1] == ["--store"] else ""


if __name__ == "__main__":
    sys.exit(main(*_arguments(sys.argv[1:])))
