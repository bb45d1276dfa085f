"""Records of finished tasks, so that a rerun after a kill runs only the missing tasks, and counts nothing twice.

A task that writes files and returns their statistics is `recorded`. Its record is written last, so if the record
exists, the files are complete. A task without statistics needs no record: it checks for its last file.
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
    """The row of a task from its record in `folder`. Without a record, runs `make()`, which writes the task's files."""
    path = Path(folder) / _RECORDS / f"{task}.json"
    if path.exists():
        found: Row = json.loads(path.read_text())
        return found
    row = make()
    write_text(path, json.dumps(row))
    return row


def forget_records(folder: Path) -> None:
    """Removes all records after the last task, because they are no part of the result."""
    shutil.rmtree(folder / _RECORDS, ignore_errors=True)
