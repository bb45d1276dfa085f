"""What tasks have done, so that a rerun after a kill does only what is missing, and counts nothing again.

A task that writes files and says what they hold is `recorded`: its row is written last, so where a record is, the files
are whole. A task that says nothing needs no record: it looks for its last file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from moray.pipelines.shared.shards import Row
from moray.platform.core.atomic import write_text

_RECORDS = ".records"


def recorded(folder: Path | str, task: str, make: Callable[[], Row]) -> Row:
    """The row of a task, as a record in `folder` has it; without one, `make()`, which writes the task's files."""
    path = Path(folder) / _RECORDS / f"{task}.json"
    if path.exists():
        found: Row = json.loads(path.read_text())
        return found
    row = make()
    write_text(path, json.dumps(row))
    return row


def forget_records(folder: Path) -> None:
    """Once all tasks are done: their records are no part of the result."""
    shutil.rmtree(folder / _RECORDS, ignore_errors=True)
