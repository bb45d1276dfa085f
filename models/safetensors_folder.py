"""A Hugging Face folder of safetensors files: writes by a plan, reads tensor by tensor.

Notable: the writer knows every tensor's dtype and shape in advance. So it writes a shard's header first and each tensor
directly to its offset, in any order. Nothing is buffered, and memory is limited to one tensor. (The library's
`save_file` takes a whole shard and copies it once more.) Shards are renamed to their final names once all are complete,
and `config.json` is removed first and written last. So a folder with a config is complete at all times.
"""

import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moray.models.files import CONFIG, INDEX, SINGLE, read_object, weight_files
from moray.models.tensors import Shape

_TEMPORARY = ".part-{:05d}.safetensors"
SHARD_BYTES = 2_000_000_000
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}

_OPEN_FILES = 64  # at once: a large model has thousands of shards, and a process may open 1,024 files

Layout = Mapping[str, tuple[str, Shape]]


@dataclass
class Audit:
    """Number of tensors, and of their values, that were checked."""

    tensors: int = 0
    values: int = 0

    def add(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self.tensors += 1
                self.values += tensor.numel()


class FolderWriter:
    """Writes the tensors of `layout` (name -> safetensors dtype, shape) to a folder, replacing an existing model.

    A context manager: leaving it without `finish`, or with an error, leaves no model and no temporary files.
    written: the tensors so far.
    """

    def __init__(self, folder: Path, layout: Layout, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._places: dict[str, tuple[int, int, int]] = {}  # name -> shard, offset in the file, bytes
        self._layout = layout
        self._shards = list(_shards(layout, shard_bytes))
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()  # open ones by shard, the last used one last
        self.written = Audit()

    def __enter__(self) -> "FolderWriter":
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / CONFIG).unlink(missing_ok=True)
        for number, names in enumerate(self._shards):
            header, begin = _header(self._layout, names), 0
            for name in names:
                size = _bytes(*self._layout[name])
                self._places[name] = (number, len(header) + begin, size)
                begin += size
            with self._path(number).open("wb") as file:
                file.write(header)
                file.truncate(len(header) + begin)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor, which must have the layout's dtype and shape. Each name once."""
        shard, offset, size = self._places.pop(name)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert raw.nbytes == size
        file = self._open(shard)
        file.seek(offset)
        raw.tofile(file)
        self.written.add(tensor)

    def _open(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            if len(self._files) == _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = self._path(shard).open("r+b")
        self._files.move_to_end(shard)
        return self._files[shard]

    def _path(self, shard: int) -> Path:
        return self._folder / _TEMPORARY.format(shard)

    def _close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    @property
    def missing(self) -> list[str]:
        """Names of tensors that have not been written."""
        return list(self._places)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Renames the shards, removes files of an earlier model, and writes index and config."""
        self._close()
        for number in range(len(self._shards)):
            with self._path(number).open("r+b") as file:
                os.fsync(file.fileno())
        for stale in [*self._folder.glob("model*.safetensors"), self._folder / INDEX]:
            stale.unlink(missing_ok=True)
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).replace(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            total = sum(_bytes(*entry) for entry in self._layout.values())
            write_json_file(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json_file(self._folder / CONFIG, config)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        for path in self._folder.glob(".part-*"):
            path.unlink()


class _Place(NamedTuple):
    """Location of a tensor: its file, dtype, shape, offset and size in bytes."""

    path: Path
    dtype: str
    shape: Shape
    offset: int
    size: int


class FolderReader:
    """The tensors of a folder, read on request. Raises FileNotFoundError or ValueError with the file's name.

    Notable: tensors are read, not mapped. Mapped files would count as memory of the process, as large as the
    checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = read_object(folder / CONFIG)
        self._places: dict[str, _Place] = {}
        for file in weight_files(folder):
            # Read from the files themselves, because the index may be wrong.
            for name, place in _places(folder / file):
                if (other := self._places.setdefault(name, place)) is not place:
                    raise ValueError(f"tensor {name!r} is in two files, {other.path} and {place.path}")

    def names(self) -> Iterator[str]:
        """Every tensor's name, file by file."""
        yield from self._places

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def entry(self, name: str) -> tuple[str, Shape]:
        """A tensor's safetensors dtype and shape, without reading it."""
        return self._places[name].dtype, self._places[name].shape

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, whose dtype must be one of `DTYPES`, or consecutive rows of it."""
        place = self._places[name]
        begin, end, _ = rows.indices(place.shape[0])
        row = place.size // max(1, place.shape[0])
        raw = np.fromfile(place.path, np.uint8, (end - begin) * row, offset=place.offset + begin * row)
        if raw.nbytes != (end - begin) * row:
            raise ValueError(f"tensor {name!r} cannot be read from {place.path}: the file is truncated")
        return torch.from_numpy(raw).view(DTYPES[place.dtype]).view(end - begin, *place.shape[1:])


def _places(path: Path) -> Iterator[tuple[str, _Place]]:
    """The tensors of one file by name, after the library has validated it."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entries = json.loads(file.read(length))
    for name, entry in entries.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, _Place(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)


def write_json_file(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _bytes(dtype: str, shape: Shape) -> int:
    size = DTYPES[dtype].itemsize
    for extent in shape:
        size *= extent
    return size


def _shards(layout: Layout, limit: int) -> Iterator[list[str]]:
    """Consecutive names up to `limit` bytes; a larger tensor is a shard of its own."""
    names: list[str] = []
    size = 0
    for name, entry in layout.items():
        if names and size + _bytes(*entry) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(*entry)
    yield names


def _header(layout: Layout, names: list[str]) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, then JSON, padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        dtype, shape = layout[name]
        end = begin + _bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
