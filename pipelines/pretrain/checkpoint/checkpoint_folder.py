"""The folder of a run's checkpoints: on a disk that all ranks see (`checkpoint_files.py`), or in the store.

    step-00000400/__0_0.distcp, .metadata    in the store: written by the ranks, each file uploaded whole
    step-00000400/checksums.json             written last: it marks the checkpoint as complete

In the store, nothing is renamed: a checkpoint without checksums.json does not exist. The server checks the SHA-256 of
what it receives, so a reader compares sizes only.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import ValidationError
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter

from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.checkpoint.checkpoint_files import CHECKSUMS, INDEX, Checksums
from moray.platform.core.atomic import write_bytes
from moray.platform.store.manifest import FileEntry
from moray.platform.store.object_reader import ObjectReader
from moray.platform.store.paths import (
    AnyPath,
    StorePath,
    entries_below,
    in_threads,
    new_file,
    remove_folder,
    write_file,
)


class CheckpointFolder(Protocol):
    """The checkpoints of one run. A checkpoint is known by its number of steps. Rank 0 calls `prepare`, `commit`,
    `set_aside` and `remove`."""

    def complete_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""

    def prepare(self, steps: int) -> None:
        """Makes place for a new checkpoint, and removes unfinished ones."""

    def writer(self, steps: int) -> FileSystemWriter:
        """The writer of a new checkpoint."""

    def write_index(self, steps: int, index: bytes) -> None:
        """Writes torch's index of the tensors of a new checkpoint."""

    def written(self, steps: int, rank: int) -> list[FileEntry]:
        """The files that a rank has written; the index is among those of rank 0."""

    def commit(self, steps: int, files: Sequence[FileEntry]) -> None:
        """Makes a written checkpoint a complete one, atomically and durably."""

    def reader(self, steps: int) -> FileSystemReader:
        """The reader of a complete checkpoint."""

    def find_damage(self, steps: int, share: tuple[int, int]) -> str:
        """Description of damage to a complete checkpoint, or "". share: (k, n) checks every n-th file from k on."""

    def set_aside(self, steps: int) -> None:
        """Makes a damaged or discarded checkpoint unusable."""

    def outdated(self, keep: int, hours: float | None) -> list[int]:
        """Complete checkpoints that retention removes: all but the newest `keep`, and those older than `hours`."""

    def remove(self, steps: int) -> None:
        """Removes a complete checkpoint, so that a partly removed one does not count as complete."""


def open_checkpoints(folder: AnyPath) -> CheckpointFolder:
    """The checkpoints in a folder."""
    return DiskFolder(folder) if isinstance(folder, Path) else StoreFolder(folder)


class DiskFolder:
    """Checkpoints on a disk that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def complete_steps(self) -> list[int]:
        return checkpoint_files.complete_steps(self._folder)

    def prepare(self, steps: int) -> None:
        checkpoint_files.prepare(self._folder, steps)

    def writer(self, steps: int) -> FileSystemWriter:
        return FileSystemWriter(checkpoint_files.unfinished_path(self._folder, steps))

    def write_index(self, steps: int, index: bytes) -> None:
        write_bytes(checkpoint_files.unfinished_path(self._folder, steps) / INDEX, index)

    def written(self, steps: int, rank: int) -> list[FileEntry]:
        unfinished = checkpoint_files.unfinished_path(self._folder, steps)
        return checkpoint_files.list_hashed_files(unfinished, _patterns(rank))

    def commit(self, steps: int, files: Sequence[FileEntry]) -> None:
        checkpoint_files.commit(self._folder, steps, files)

    def reader(self, steps: int) -> FileSystemReader:
        return FileSystemReader(checkpoint_files.path_of(self._folder, steps))

    def find_damage(self, steps: int, share: tuple[int, int]) -> str:
        return checkpoint_files.find_damage(self._folder, steps, share)

    def set_aside(self, steps: int) -> None:
        checkpoint_files.set_aside(self._folder, steps)

    def outdated(self, keep: int, hours: float | None) -> list[int]:
        return checkpoint_files.outdated(self._folder, keep, hours)

    def remove(self, steps: int) -> None:
        checkpoint_files.remove_checkpoint(self._folder, steps)


class StoreFolder:
    """Checkpoints in the store."""

    def __init__(self, folder: StorePath) -> None:
        self._folder = folder

    def complete_steps(self) -> list[int]:
        prefix = f"{self._folder.key}/step-"
        listed = self._folder.bucket.objects(prefix)
        return sorted(
            int(item.key.removeprefix(prefix).partition("/")[0]) for item in listed if item.key.endswith(CHECKSUMS)
        )

    def prepare(self, steps: int) -> None:
        complete = set(self.complete_steps())
        for name in self._folder.bucket.folders(f"{self._folder.key}/"):
            if name.startswith("step-") and int(name.removeprefix("step-")) not in complete:
                remove_folder(self._folder / name)
        if steps in complete:
            self.remove(steps)

    def writer(self, steps: int) -> FileSystemWriter:
        writer = FileSystemWriter(Path(), sync_files=False)
        writer.fs, writer.path = StoreFileSystem(), self._path(steps)  # type: ignore[assignment]
        return writer

    def write_index(self, steps: int, index: bytes) -> None:
        write_file(self._path(steps) / INDEX, index)

    def written(self, steps: int, rank: int) -> list[FileEntry]:
        beginnings = [f"__{rank}_", *([INDEX] if rank == 0 else [])]
        return [entry for one in beginnings for entry in entries_below(self._path(steps), one)]

    def commit(self, steps: int, files: Sequence[FileEntry]) -> None:
        listing = Checksums(files=list(files)).model_dump_json(indent=1) + "\n"
        write_file(self._path(steps) / CHECKSUMS, listing.encode())

    def reader(self, steps: int) -> FileSystemReader:
        reader = FileSystemReader(Path())
        reader.fs, reader.path = StoreFileSystem(), self._path(steps)  # type: ignore[assignment]
        return reader

    def find_damage(self, steps: int, share: tuple[int, int]) -> str:
        path = self._path(steps)
        try:
            files = Checksums.model_validate_json((path / CHECKSUMS).read_text()).files
        except (OSError, ValidationError) as error:
            return f"cannot read {CHECKSUMS}: {type(error).__name__}"
        mine = files[share[0] :: share[1]]
        found = in_threads(lambda entry: path.bucket.head((path / entry.path).key), mine)
        for entry, item in zip(mine, found, strict=True):
            if item is None or item.size != entry.size:
                has = "is missing" if item is None else f"has {item.size} bytes instead of {entry.size}"
                return f"{entry.path} {has}"
        return ""

    def set_aside(self, steps: int) -> None:
        (self._path(steps) / CHECKSUMS).unlink()

    def outdated(self, keep: int, hours: float | None) -> list[int]:
        steps = self.complete_steps()
        old = steps[:-keep]
        if hours is not None:
            limit = time.time() - hours * 3600
            old += [step for step in steps[-keep:-1] if (self._path(step) / CHECKSUMS).described().modified < limit]
        return old

    def remove(self, steps: int) -> None:
        self.set_aside(steps)
        remove_folder(self._path(steps))

    def _path(self, steps: int) -> StorePath:
        return self._folder / checkpoint_files.path_of(Path(), steps).name


class StoreFileSystem(FileSystemBase):
    """torch's access to the files of a checkpoint in the store."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        if mode == "rb":
            found = path.described()
            with io.BufferedReader(ObjectReader(path.bucket, path.key, found.size, found.etag)) as stream:
                yield stream
            return
        with new_file(path) as temporary, temporary.open(mode) as file:
            yield cast(io.IOBase, file)

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        """Moves a small object: `.metadata` gets its final name."""
        write_file(new_path, path.read_bytes())
        path.unlink()

    def mkdir(self, path: Any) -> None:
        """Does nothing: a store has no folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, StorePath)

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


def _patterns(rank: int) -> list[str]:
    return [f"__{rank}_*.distcp", *([INDEX] if rank == 0 else [])]
