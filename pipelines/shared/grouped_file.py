"""Exchange of rows between tasks: an Arrow file with one batch per group, which the task of that group reads.

A file on disk is memory-mapped. Of an object in the store, the ranges of the index and of the batch are read. A task
reads only its own part of every file. The exchanged rows hold numbers and keys, never text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.shared.arrays import Indices
from moray.platform.store.paths import AnyPath, new_file, open_ranges

_GROUPS = b"groups"  # in the schema's metadata: the group of each batch, int32, ascending


@contextlib.contextmanager
def arrow_writer(path: AnyPath, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """A writer of a mappable Arrow file. The file gets its name when the block ends without an error."""
    with new_file(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        yield writer


def write_groups(path: AnyPath, table: pa.Table, groups: Indices) -> None:
    """Writes the rows of a table by group. The order within a group is kept."""
    order = np.argsort(groups, kind="stable")
    names, starts = np.unique(groups[order], return_index=True)
    schema = table.schema.with_metadata({_GROUPS: names.astype(np.int32).tobytes()})
    with arrow_writer(path, schema) as writer:
        for part in np.split(order, starts[1:]):
            writer.write_table(table.take(pa.array(part)).combine_chunks())


def _opened(path: AnyPath) -> pa.NativeFile:
    return pa.memory_map(str(path)) if isinstance(path, Path) else pa.PythonFile(open_ranges(path), mode="r")


def read_group(path: AnyPath, group: int) -> pa.RecordBatch | None:
    """The rows of a group; None if the file has none."""
    reader = pa.ipc.open_file(_opened(path))
    names = np.frombuffer(reader.schema.metadata[_GROUPS], np.int32)
    at = int(np.searchsorted(names, group))
    return reader.get_batch(at) if at < len(names) and names[at] == group else None


def read_columns(path: AnyPath, group: int) -> dict[str, npt.NDArray[Any]]:
    """The rows of a group as copied numeric columns, which are empty if the file has none."""
    with _opened(path) as file:
        reader = pa.ipc.open_file(file)
        names = np.frombuffer(reader.schema.metadata[_GROUPS], np.int32)
        at = int(np.searchsorted(names, group))
        found = at < len(names) and names[at] == group
        batch = reader.get_batch(at) if found else pa.RecordBatch.from_pylist([], reader.schema)
        return {name: batch[name].to_numpy().copy() for name in batch.schema.names}
