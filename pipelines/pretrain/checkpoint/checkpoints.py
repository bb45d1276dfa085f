"""Checkpoints by torch.distributed.checkpoint, as logical tensors: one key per parameter, and one per expert.

The keys of a checkpoint do not depend on the layout that wrote it; each rank loads the keys that it holds. Training
pauses only while every rank copies its own part (`host_copy.py`). A thread then writes and hashes the copy
(`rank_writer.py`), with a process group of its own, and rank 0 renames the folder when all ranks are done
(`checkpoint_files.py`). The index of the tensors is made at a process's first save, in another process, and is the same
for later ones (`checkpoint_index.py`). A failed save is reported; training continues, and the previous checkpoint is
kept.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.checkpoint.archive import Archive, Archived
from moray.pipelines.pretrain.checkpoint.checkpoint_folder import open_checkpoints
from moray.pipelines.pretrain.checkpoint.checkpoint_index import merge_listings
from moray.pipelines.pretrain.checkpoint.host_copy import POSITION, HostCopy
from moray.pipelines.pretrain.checkpoint.rank_writer import RankWriter
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart
from moray.pipelines.pretrain.checkpoint.training_state import TrainingState
from moray.pipelines.pretrain.mesh import Mesh
from moray.platform.core.errors import InputError
from moray.platform.store.manifest import FileEntry
from moray.platform.store.paths import AnyPath

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """The result of a save.

    stalled: seconds that training paused. seconds: from the start of the save until it was on disk. bytes: of all
    ranks. error: reason of a failure, "" on success.
    """

    steps: int
    stalled: float
    seconds: float
    bytes: int
    error: str = ""


@dataclass(frozen=True)
class Restored:
    """The position that training resumes from, and warnings."""

    steps: int
    tokens: int
    warnings: tuple[str, ...] = ()
    fetched: bool = False  # from the archive


class CheckpointFailed(Exception):
    """A checkpoint could not be written or read. The message is the error of the first rank that failed."""


class Checkpoints:
    """The checkpoints of one run under `folder`. All ranks must call the same methods in the same order."""

    def __init__(
        self,
        folder: AnyPath,
        mesh: Mesh,
        keep: int = 2,
        keep_hours: float | None = None,
        archive: Archive | None = None,
    ) -> None:
        self._folder = open_checkpoints(folder)
        self._disk = folder if isinstance(folder, Path) else None
        self._mesh = mesh
        self._keep, self._hours = keep, keep_hours
        self._archive = archive
        self._copy = HostCopy(shared=mesh.rank == 0)
        self._writer = RankWriter(mesh.rank)
        self._indexed: list[str] = []  # digests of the listings, by rank, that the index is of
        self._index = b""  # on rank 0
        self._writing: _PendingSave | None = None
        self._ended: list[Saved] = []

    def save(self, state: TrainingState, steps: int, tokens: int) -> None:
        """Starts to write the checkpoint after `steps` steps. Waits for the previous save first."""
        began = time.monotonic()
        self.wait()
        copy = self.copy_owned(state, steps, tokens)
        stalled = time.monotonic() - began
        self._writing = _PendingSave(lambda: self._write(copy, steps), steps, began, stalled)

    def wait(self) -> None:
        """Waits for the pending save, if there is one."""
        if self._writing:
            self._ended.append(self._writing.result())
            self._writing = None

    def ended(self) -> list[Saved]:
        """The saves that ended since the last call, in order."""
        if self._writing and self._writing.is_over:
            self.wait()
        ended, self._ended = self._ended, []
        return ended

    def discard_after(self, steps: int) -> None:
        """Sets aside every checkpoint of more than `steps` steps, also in the archive, so that none is resumed from."""
        later = self._on_all(lambda: [at for at in self._folder.complete_steps() if at > steps])[0]
        for at in later:
            self._on_all(self._rank_0_only(partial(self._folder.set_aside, at)))
        if self._archive:
            self._archive.wait()
            self._on_all(partial(self._archive.discard_after, steps))

    def archived(self, last: bool = False) -> list[Archived]:
        """The copies to the archive that ended since the last call; with `last`, waits for all of them."""
        if self._archive is None:
            return []
        if last:
            self._archive.wait()
        return self._archive.ended()

    def restore(self, state: TrainingState) -> Restored:
        """Loads the newest undamaged checkpoint. steps and tokens of the result are 0 if there is none."""
        notes: list[str] = []
        damaged: set[int] = set()  # in the archive
        while (found := self._newest(damaged, notes)) is not None:
            newest, on_disk = found
            if not on_disk:
                self._fetch(newest)
            damage = self._find_damage(newest)
            if not damage:
                steps, tokens = self._load(state, newest)
                return Restored(steps, tokens, tuple(notes), fetched=not on_disk)
            if not on_disk:
                damaged.add(newest)
            where = "" if on_disk else " in the archive"
            notes.append(f"the checkpoint at step {newest}{where} is damaged and is not used: {damage}")
            self._on_all(self._rank_0_only(partial(self._folder.set_aside, newest)))
        return Restored(0, 0, tuple(notes))

    def copy_owned(self, state: TrainingState, steps: int, tokens: int) -> dict[str, StoredPart]:
        """Copies of the tensors that this rank writes, by key. The next call overwrites them."""
        return self._copy.update(state, steps, tokens)

    def _write(self, copy: dict[str, StoredPart], steps: int) -> int:
        """The part of a save that runs beside training. Returns the bytes that all ranks wrote."""
        self._on_all(self._rank_0_only(lambda: self._folder.prepare(steps)))
        self._update_index(self._on_all(lambda: self._write_part(copy, steps)))
        by_rank = self._on_all(lambda: self._written(steps))
        files = [entry for files in by_rank for entry in files]
        self._on_all(self._rank_0_only(lambda: self._finish(steps, files)))
        if self._archive:
            self._archive.start()
        return sum(entry.size for entry in files)

    def _write_part(self, copy: dict[str, StoredPart], steps: int) -> str:
        """Writes this rank's tensors. Returns the digest of their listing."""
        self._writer.write(copy, self._folder.writer(steps))
        return self._writer.digest

    def _update_index(self, digests: list[str]) -> None:
        """Makes the index on rank 0, if the listing of any rank has changed. digests: of the listings, by rank."""
        if digests == self._indexed:
            return
        listings = self._gather_to_0(self._writer.listing)
        self._on_all(self._rank_0_only(lambda: self._make_index(listings)))
        self._indexed = digests

    def _make_index(self, listings: list[bytes]) -> None:
        self._index = merge_listings(listings)

    def _gather_to_0(self, data: bytes) -> list[bytes]:
        """The data of all ranks, by rank, on rank 0; an empty list on others."""
        if self._alone:
            return [data]
        gathered: list[Any] | None = [None] * self._mesh.world if self._mesh.rank == 0 else None
        dist.gather_object(data, gathered, dst=0, group=self._mesh.io_group)
        return gathered or []

    def _written(self, steps: int) -> list[FileEntry]:
        """The files of this rank, on rank 0 with the index, which it writes."""
        if self._mesh.rank == 0:
            self._folder.write_index(steps, self._index)
        return self._folder.written(steps, self._mesh.rank)

    def _finish(self, steps: int, files: list[FileEntry]) -> None:
        self._folder.commit(steps, files)
        for old in self._folder.outdated(self._keep, self._hours):
            if self._may_remove(old):
                self._folder.remove(old)

    def _may_remove(self, steps: int) -> bool:
        """Whether a checkpoint may be removed from the disk: it must be archived, if there is an archive."""
        try:
            return self._archive is None or self._archive.has(steps)
        except InputError:
            return False

    def _newest(self, damaged: Set[int], notes: list[str]) -> tuple[int, bool] | None:
        """(the newest checkpoint according to rank 0, whether it is on disk); None if there is none.

        damaged: archived checkpoints to ignore. A checkpoint that is not on disk is in the archive.
        """

        def look() -> tuple[int | None, int | None, str]:
            on_disk = max(self._folder.complete_steps(), default=None)
            try:
                return on_disk, self._archive.newest(damaged) if self._archive else None, ""
            except InputError as error:
                if on_disk is None:
                    raise
                return on_disk, None, str(error)

        on_disk, archived, failure = self._on_all(look)[0]
        if failure:
            notes.append(f"the archive is unavailable; the newest checkpoint on disk is used: {failure}")
        if archived is not None and (on_disk is None or archived > on_disk):
            return archived, False
        return None if on_disk is None else (on_disk, True)

    def _fetch(self, steps: int) -> None:
        """Downloads an archived checkpoint; every rank downloads a share of its files."""
        archive, disk = self._archive, self._disk
        assert archive is not None
        assert disk is not None
        self._on_all(self._rank_0_only(lambda: checkpoint_files.prepare(disk, steps)))
        self._on_all(lambda: archive.fetch(steps))
        self._on_all(self._rank_0_only(lambda: checkpoint_files.publish(disk, steps)))

    def _find_damage(self, steps: int) -> str:
        share = (self._mesh.rank, self._mesh.world)
        by_rank = self._on_all(lambda: self._folder.find_damage(steps, share))
        return next(filter(None, by_rank), "")

    def _load(self, state: TrainingState, steps: int) -> tuple[int, int]:
        """Loads a checkpoint into `state`. Returns its steps and tokens."""
        tensors: dict[str, torch.Tensor] = dict(state.shared())
        for fragment in state.fragments():
            part = StoredPart(fragment.tensor, fragment.offset, fragment.total)
            tensors[f"{fragment.kind}/{fragment.name}"] = part
        tensors[POSITION] = position = torch.zeros(2, dtype=torch.int64)
        _load(tensors, self._folder.reader(steps), self._mesh.io_group, self._alone)
        state.loaded(int(position[0]))
        return int(position[0]), int(position[1])

    @property
    def _alone(self) -> bool:
        return self._mesh.io_group is None

    def _rank_0_only(self, action: Callable[[], None]) -> Callable[[], None]:
        return action if self._mesh.rank == 0 else lambda: None

    def _on_all(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank. Returns the results by rank. Raises CheckpointFailed on all if any failed."""
        result, failure = None, ""
        try:
            result = action()
        except Exception as error:  # of any kind: the other ranks must fail too
            failure = str(error) or type(error).__name__
        if self._alone:
            everyone: list[Any] = [(result, failure)]
        else:
            everyone = [None] * self._mesh.world
            dist.all_gather_object(everyone, (result, failure), group=self._mesh.io_group)
        if reason := next((failure for _, failure in everyone if failure), ""):
            raise CheckpointFailed(reason)
        return [result for result, _ in everyone]


class _PendingSave:
    """A save that is being written, in a daemon thread."""

    def __init__(self, write: Callable[[], int], steps: int, began: float, stalled: float) -> None:
        self._write = write
        self._steps, self._began, self._stalled = steps, began, stalled
        self._outcome: Saved | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Saved:
        self._thread.join()
        assert self._outcome is not None
        return self._outcome

    def _run(self) -> None:
        written, reason = 0, ""
        try:
            written = self._write()
        except Exception as error:  # training continues after any error, and reports it
            reason = str(error) or type(error).__name__
        self._outcome = Saved(self._steps, self._stalled, time.monotonic() - self._began, written, reason)


def _load(state: dict[str, Any], reader: FileSystemReader, group: dist.ProcessGroup | None, alone: bool) -> None:
    """Loads in place. alone: without other ranks, and without torch's warning about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(state, storage_reader=reader, process_group=group, no_dist=alone)
        except CheckpointException as error:  # a BaseException
            raise CheckpointFailed(f"cannot read {reader.path}: {_first_reason(error)}") from None


def _first_reason(error: CheckpointException) -> str:
    """The error of the first rank that failed, without tracebacks."""
    exception, _ = next(iter(error.failures.values()))
    return str(exception) or type(exception).__name__
