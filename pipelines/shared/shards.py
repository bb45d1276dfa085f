"""Runs a function over shards as Ray Data tasks. All text steps use the cluster this way.

Ray transports only a shard's description to the task and its statistics back. Text is read and written inside the task,
as files on disk or in the store (`platform/store/paths.py`), so Ray's object store never holds text. A shard is the
unit of work and of resume (`task_records.py` records finished shards), and the result does not depend on the number of
workers.

A task processes several shards, because Ray Data's driver spends about 30 ms per task. The output block size is limited
to one byte, so that every block holds one row and a shard's row is available as soon as the shard is done.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from moray.pipelines.shared.documents import shard_sizes
from moray.platform.core.errors import StepFailed
from moray.platform.plan.context import StepContext
from moray.platform.store.paths import AnyPath, any_path

Row = dict[str, Any]
_ERROR, _TRACEBACK = "error", "traceback"
# When Ray Data starts, it does not know the cluster's resources yet and runs one task at a time until its next query,
# by default after a second.
_LIMITS_SECONDS = 0.1
_POLL_SECONDS = 1.0
_RETRIES = 5  # of a task whose worker or node is lost; Ray Data retries indefinitely by default
_TASKS_PER_CPU = 8  # enough to balance slow tasks


def input_shards(folder: AnyPath) -> list[Row]:
    """Describes each shard of a Documents folder for `map_shards`: its number, path, and file size in bytes.

    Raises ValueError if there are none.
    """
    sizes = shard_sizes(folder).items()
    return [{"shard": i, "path": str(folder / name), "size": size} for i, (name, size) in enumerate(sizes)]


def shard_path(shard: Row) -> AnyPath:
    """Path of the shard's file, for a task on any host."""
    return any_path(shard["path"])


def shard_stem(shard: Row) -> str:
    """The name of the shard's file without its suffix."""
    return PurePath(shard["path"]).stem


def output_path(folder: AnyPath, shard: Row) -> AnyPath:
    """Path of a task's output for a shard, which has the shard's own name."""
    return folder / PurePath(shard["path"]).name


def file_bytes(shard: Row) -> float:
    """The work of a shard, measured as the size of its file in bytes."""
    return float(shard["size"])


def map_shards(
    ctx: StepContext[Any],
    phase: str,
    shards: Sequence[Row],
    function: Callable[[Row], Row],
    unit: str,
    work: Callable[[Row], float],
    detail: Callable[[Counter[str], float], str] | None = None,
    here: bool = False,
    partly: Callable[[], float] | None = None,
) -> list[Row]:
    """Applies `function` to every shard; returns its rows sorted by their `shard` number.

    `function` must be importable by workers (a module-level function or a `functools.partial` of one). `work` returns
    the amount of work of an input row in `unit`, for progress. `detail`, such as `pace`, returns a progress text from
    the sums of the numbers in all rows so far and the seconds since the start. `here`: run in this process, for work
    that takes less time than starting tasks. `partly`: returns the work done on unfinished shards; called once a
    second. Raises StepFailed for the first shard that fails.
    """
    total = sum(work(shard) for shard in shards)
    ctx.progress(phase, 0, total, unit)
    amount = {shard["shard"]: work(shard) for shard in shards}
    guarded = partial(_guarded, function=function)
    rows, done, text, totals, began = [], 0.0, "", Counter[str](), time.monotonic()
    lock = threading.Lock()

    def report_partial() -> None:
        with lock:
            ctx.progress(phase, min(total, done + partly()) if partly else done, total, unit, text)

    with _polling(report_partial if partly and not here else None):
        for row in map(guarded, shards) if here or not shards else _in_tasks(shards, guarded):
            if row[_ERROR]:
                ctx.write_log("traceback", row[_TRACEBACK])
                raise StepFailed(f"{phase}: {row[_ERROR]}", f"details: {ctx.log_path('traceback')}")
            rows.append(row)
            with lock:
                done += amount[row["shard"]]
                totals.update({name: value for name, value in row.items() if isinstance(value, int)})
                text = detail(totals, max(time.monotonic() - began, 1e-9)) if detail else ""
                ctx.progress(phase, done, total, unit, text)
    return sorted(rows, key=lambda row: int(row["shard"]))


@contextlib.contextmanager
def _polling(poll: Callable[[], None] | None) -> Iterator[None]:
    """Calls `poll` once a second from another thread while the block runs. Its errors are ignored: the block reports
    progress too, and raises the same errors (for example that the run was stopped)."""
    if not poll:
        yield
        return
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(_POLL_SECONDS):
            with contextlib.suppress(Exception):
                poll()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _in_tasks(shards: Sequence[Row], function: Callable[[Row], Row]) -> Iterator[Row]:
    import ray.data
    import ray.exceptions
    from ray.data._internal.execution.resource_manager import ResourceManager

    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = _LIMITS_SECONDS  # type: ignore[assignment]
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    tasks = min(len(shards), _TASKS_PER_CPU * max(1, cpus))
    dataset = ray.data.from_items(list(shards), override_num_blocks=tasks).map(
        function, num_cpus=1, max_retries=_RETRIES
    )
    dataset.context.target_max_block_size = 1
    try:
        yield from dataset.iter_rows()
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.OwnerDiedError,
    ) as error:
        first = str(error).strip().partition("\n")[0]
        text = f"a task ended without a result, also after retries: {type(error).__name__}: {first}"
        hint = "see the worker's log among Ray's logs, in MORAY_HOME/logs or the run's folder"
        raise StepFailed(text, hint) from error


def pace(totals: Counter[str], seconds: float) -> str:
    """Documents and megabytes per second, and dropped documents by reason. The totals are of rows with `documents`,
    `bytes` (number of bytes read) and `dropped:REASON`."""
    rates = f"{totals['documents'] / seconds:,.0f} documents/s, {totals['bytes'] / 1e6 / seconds:.1f} MB/s"
    dropped = [(name.partition(":")[2], n) for name, n in totals.most_common() if name.startswith("dropped:") and n]
    return rates + ("; dropped " + ", ".join(f"{n} {reason}" for reason, n in dropped) if dropped else "")


def _guarded(shard: Row, function: Callable[[Row], Row]) -> Row:
    """The function's row, or its error as data: Ray Data's wrapper would hide the message of a raised error."""
    try:
        return {**function(shard), _ERROR: "", _TRACEBACK: ""}
    except Exception as error:
        return {"shard": shard["shard"], _ERROR: f"{type(error).__name__}: {error}", _TRACEBACK: traceback.format_exc()}
