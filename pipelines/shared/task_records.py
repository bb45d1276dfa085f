"""Records of finished tasks, so that a rerun after a kill runs only the missing tasks, and counts nothing twice.

A task that writes files and returns their statistics is `recorded`. Its record is written last, so if the record
exists, the files are complete. A task without statistics needs no record: it checks for its last file.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from moray.pipelines.shared.shards import Row
from moray.platform.store.paths import AnyPath, remove_folder, write_file

_RECORDS = ".records"


def recorded(folder: AnyPath, task: str, make: Callable[[], Row]) -> Row:
    """The row of a task from its record in `folder`. Without a record, runs `make()`, which writes the task's files."""
    path = folder / _RECORDS / f"{task}.json"
    try:
        found: Row = json.loads(path.read_text())
    except FileNotFoundError:
        found = make()
        write_file(path, json.dumps(found).encode())
    return found


def forget_records(folder: AnyPath) -> None:
    """Removes all records after the last task, because they are no part of the result."""
    remove_folder(folder / _RECORDS)
