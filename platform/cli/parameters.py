"""Parameters shared by several commands, and the progress of transfers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated

from cyclopts import Parameter

UploadAnyway = Annotated[
    bool, Parameter(name="--yes", negative=(), help="upload the recipe's files even if they are larger than 1 GB")
]
ClusterName = Annotated[str, Parameter(name="--cluster", help="name of the cluster; `moray cluster list` shows all")]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative=(),
        help="override a recipe field: STEP.FIELD=VALUE or tracking.FIELD=VALUE; may be repeated",
    ),
]


@contextlib.contextmanager
def transfer_progress() -> Iterator[Callable[[str, float, float], None]]:
    """Yields a function that shows a phase of a transfer with its rate and ETA, while the block runs."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from moray.platform.run.console import err

    columns = (TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err(), transient=True) as shown:
        tasks: dict[str, object] = {}

        def progress(phase: str, done: float, total: float) -> None:
            if phase not in tasks:
                tasks[phase] = shown.add_task(phase, total=total)
            shown.update(tasks[phase], completed=done, total=total)  # type: ignore[arg-type]

        yield progress
