"""torch's index of a checkpoint (`.metadata`), from the listings of all ranks.

torch's own planner and writer make it, in a child process if it is large. In a thread of rank 0, their Python would
keep that rank from launching kernels, and all ranks would wait for it (`benchmarks/checkpoint_plans.py`).
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart

_FEW = 5_000  # tensors whose index takes less time than the start of a process
_LENGTH = struct.Struct("<q")
_NICENESS = 10  # of the process: training needs the cores first


class IndexFailed(Exception):
    """The index could not be made."""


class StoredPlace(NamedTuple):
    """Where a tensor is: its file, and offset and size there in bytes."""

    file: str
    offset: int
    length: int

    @classmethod
    def of(cls, stored: _StorageInfo) -> StoredPlace:
        return cls(stored.relative_path, stored.offset, stored.length)


def encode_listing(parts: Mapping[str, StoredPart], places: Mapping[str, StoredPlace]) -> bytes:
    """The parts that a rank has written: their number, then compressed JSON, column by column."""
    columns = {
        "key": list(parts),
        "dtype": [str(part.dtype).removeprefix("torch.") for part in parts.values()],
        "offset": [part.offset for part in parts.values()],
        "size": [len(part.part) for part in parts.values()],
        "total": [part.numel() for part in parts.values()],
        "place": [places[key] for key in parts],
    }
    return _LENGTH.pack(len(parts)) + zlib.compress(json.dumps(columns, separators=(",", ":")).encode(), 1)


def merge_listings(listings: Sequence[bytes], few: int = _FEW) -> bytes:
    """The contents of `.metadata`. listings: by rank. few: the most tensors for which no process is started.

    Raises IndexFailed if the parts of a tensor overlap or leave a gap, or if the process fails.
    """
    if sum(_LENGTH.unpack_from(listing)[0] for listing in listings) <= few:
        return _index_of([_decode(listing) for listing in listings])
    return _build_in_process(listings)


def _build_in_process(listings: Sequence[bytes]) -> bytes:
    command = [sys.executable, "-P", "-m", "moray.pipelines.pretrain.checkpoint.checkpoint_index"]
    sent = b"".join(part for listing in listings for part in (_LENGTH.pack(len(listing)), listing))
    # A child whose parent has died reads a truncated listing, or cannot write, and ends.
    done = subprocess.run(command, input=_LENGTH.pack(len(listings)) + sent, capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise IndexFailed(f"the index of the checkpoint: exit code {done.returncode}: {reason}")
    return done.stdout


def _index_of(decoded: Sequence[dict[str, list[Any]]]) -> bytes:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        _, metadata = planner.create_global_plan([SavePlan(list(_write_items(columns))) for columns in decoded])
    except ValueError as error:
        raise IndexFailed(str(error)) from None
    # What torch's planner stores of a flat state dict: the path of every key.
    metadata.planner_data = {key: (key,) for key in metadata.state_dict_metadata}
    with tempfile.TemporaryDirectory() as folder:
        _IndexWriter(folder, sync_files=False).finish(metadata, [_results(columns) for columns in decoded])
        return (Path(folder) / ".metadata").read_bytes()


class _IndexWriter(FileSystemWriter):
    """Writes an index that serves all checkpoints of one layout, so it names neither folder nor save."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def _write_items(columns: dict[str, list[Any]]) -> Iterator[WriteItem]:
    properties = {name: TensorProperties(dtype=getattr(torch, name)) for name in set(columns["dtype"])}
    names = ("key", "dtype", "offset", "size", "total")
    for key, dtype, offset, size, total in zip(*(columns[name] for name in names), strict=True):
        chunk = ChunkStorageMetadata(torch.Size([offset]), torch.Size([size]))
        data = TensorWriteData(chunk, properties[dtype], torch.Size([total]))
        yield WriteItem(MetadataIndex(key, [offset]), WriteItemType.SHARD, tensor_data=data)


def _results(columns: dict[str, list[Any]]) -> list[WriteResult]:
    return [
        WriteResult(MetadataIndex(key, [offset]), length, _StorageInfo(file, at, length))
        for key, offset, (file, at, length) in zip(columns["key"], columns["offset"], columns["place"], strict=True)
    ]


def _decode(listing: bytes) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = json.loads(zlib.decompress(memoryview(listing)[_LENGTH.size :]))
    return columns


def _read_listings(stream: BinaryIO) -> Iterator[bytes]:
    for _ in range(_LENGTH.unpack(stream.read(_LENGTH.size))[0]):
        yield stream.read(_LENGTH.unpack(stream.read(_LENGTH.size))[0])


def main() -> int:
    """The process: listings on stdin, the index on stdout."""
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not part of the index
    try:
        index = _index_of([_decode(listing) for listing in _read_listings(sys.stdin.buffer)])
    except IndexFailed as error:
        print(error, file=sys.stderr)
        return 1
    with out:
        out.write(index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
