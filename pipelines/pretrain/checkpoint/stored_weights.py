"""Reads the weights of a checkpoint without ranks, in bounded memory.

`torch.distributed.checkpoint.load` reads and unpickles the whole index each time, which takes seconds for hundreds of
thousands of keys. Here one reader keeps the part of the index that describes the weights.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed

_READ_BYTES = 1 << 28  # read at once


def read_weights(folder: Path, weights: str = "master") -> Iterator[tuple[str, torch.Tensor]]:
    """(logical name, flat tensor of its stored dtype) of every weight and router bias of a checkpoint, about 256 MB at
    a time.

    weights: "master" or "ema". Raises CheckpointFailed if the checkpoint has no such weights or cannot be read.
    """
    try:
        reader, entries = _open(folder, weights)
        chunk: dict[str, TensorStorageMetadata] = {}
        size = 0
        for key, entry in sorted(entries.items()):
            chunk[key] = entry
            size += entry.size.numel() * entry.properties.dtype.itemsize
            if size >= _READ_BYTES:
                yield from _read(chunk, reader)
                chunk, size = {}, 0
        yield from _read(chunk, reader)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointFailed(f"cannot read {folder}: {str(error) or type(error).__name__}") from error


def _open(folder: Path, weights: str) -> tuple[FileSystemReader, dict[str, TensorStorageMetadata]]:
    """A reader that knows where the weights are, and their sizes and dtypes by key."""
    reader = FileSystemReader(str(folder))
    index = reader.read_metadata()
    entries = {
        key: entry
        for key, entry in index.state_dict_metadata.items()
        if key.partition("/")[0] in (weights, "buffer") and isinstance(entry, TensorStorageMetadata)
    }
    if not any(key.startswith(f"{weights}/") for key in entries):
        raise CheckpointFailed(f"{folder} has no {weights} weights")
    places = {part: place for part, place in index.storage_data.items() if part.fqn in entries}
    reader.set_up_storage_reader(Metadata({}, storage_data=places), is_coordinator=True)
    return reader, entries


def _read(chunk: dict[str, TensorStorageMetadata], reader: FileSystemReader) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in chunk.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, Metadata(dict(chunk)), is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    for key, tensor in tensors.items():
        yield key.partition("/")[2], tensor
