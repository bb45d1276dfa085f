"""Checkpoints by torch.distributed.checkpoint, in logical tensors: one key per parameter and one per expert.

What a checkpoint holds does not depend on how many ranks wrote it: a rank asks for the keys it holds, whoever wrote
them. Training stands still only while every rank copies what it owns; a thread writes the copy, over a process group of
its own, hashes it, and one rank gives the folder its name when all are done (`checkpoint_files.py`). A save that fails
is reported and training goes on: the checkpoint before it is still there.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.checkpoint.archive import Archive, Archived
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart
from moray.pipelines.pretrain.checkpoint.training_state import TrainingState
from moray.pipelines.pretrain.mesh import Mesh
from moray.platform.core.errors import InputError

# The schedule position: steps taken, tokens seen. The data cursor is the step; nothing here draws random numbers
# after initialisation, so there is no generator state to keep.
POSITION = "position"
_TOGETHER = 1 << 28  # bytes that are read at once
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """How a save went: training stood still for `stalled` seconds, and it was on disk `seconds` after it began.

    `error` says why it is not there, "" if it is. `bytes` are those of all ranks.
    """

    steps: int
    stalled: float
    seconds: float
    bytes: int
    error: str = ""


@dataclass(frozen=True)
class Restored:
    """Where training goes on, and what is to be said about it."""

    steps: int
    tokens: int
    warnings: tuple[str, ...] = ()
    fetched: bool = False  # from the archive


class CheckpointFailed(Exception):
    """A checkpoint was not written, or cannot be read. The message has the first rank's reason."""


class Checkpoints:
    """The checkpoints of one run under `folder`. All ranks call the same methods in the same order."""

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        keep: int = 2,
        keep_hours: float | None = None,
        archive: Archive | None = None,
    ) -> None:
        self._folder = folder
        self._mesh = mesh
        self._keep, self._hours = keep, keep_hours
        self._archive = archive
        self._copies: dict[str, torch.Tensor] = {}
        self._writing: _Writing | None = None
        self._ended: list[Saved] = []

    def save(self, state: TrainingState, steps: int, tokens: int) -> None:
        """Begins to write the checkpoint after `steps` steps, once the one before is written."""
        began = time.monotonic()
        self.wait()
        copy = self._copy(state, steps, tokens)
        stalled = time.monotonic() - began
        self._writing = _Writing(lambda: self._write(copy, steps), steps, began, stalled)

    def wait(self) -> None:
        """Until nothing is being written any more."""
        if self._writing:
            self._ended.append(self._writing.result())
            self._writing = None

    def ended(self) -> list[Saved]:
        """The saves that ended since the last call, in their order."""
        if self._writing and self._writing.is_over:
            self.wait()
        ended, self._ended = self._ended, []
        return ended

    def discard_after(self, steps: int) -> None:
        """Sets aside every checkpoint of more than `steps` steps: nobody goes on from these, nor from the archive's."""
        later = self._together(lambda: [at for at in checkpoint_files.whole(self._folder) if at > steps])[0]
        for at in later:
            self._together(self._first_only(partial(checkpoint_files.set_aside, self._folder, at)))
        if self._archive:
            self._archive.wait()
            self._together(partial(self._archive.forget_after, steps))

    def archived(self, last: bool = False) -> list[Archived]:
        """The copies to the archive that ended since the last call; with `last`, waits for all of them."""
        if self._archive is None:
            return []
        if last:
            self._archive.wait()
        return self._archive.ended()

    def restore(self, state: TrainingState) -> Restored:
        """Loads the newest checkpoint that is what was written; steps and tokens are 0 if there is none."""
        said: list[str] = []
        refused: set[int] = set()
        while (found := self._newest(refused, said)) is not None:
            newest, is_here = found
            if not is_here:
                self._fetch(newest)
            damage = self._damage(newest)
            if not damage:
                steps, tokens = self._load(state, newest)
                return Restored(steps, tokens, tuple(said), fetched=not is_here)
            if not is_here:
                refused.add(newest)
            where = "" if is_here else ", as it is in the archive,"
            said.append(f"the checkpoint at step {newest}{where} is damaged, the one before it is used: {damage}")
            self._together(self._first_only(partial(checkpoint_files.set_aside, self._folder, newest)))
        return Restored(0, 0, tuple(said))

    def _copy(self, state: TrainingState, steps: int, tokens: int) -> dict[str, torch.Tensor]:
        """What this rank is to write, in memory of its own."""
        copy: dict[str, torch.Tensor] = {}
        for fragment in state.fragments(owned=True):
            key = f"{fragment.kind}/{fragment.name}"
            copy[key] = StoredPart(self._kept(key, fragment.tensor), fragment.offset, fragment.total)
        if self._mesh.rank == 0:
            copy |= {key: self._kept(key, tensor) for key, tensor in state.shared()}
            copy[POSITION] = torch.tensor([steps, tokens], dtype=torch.int64)
        if any(tensor.device.type == "cuda" for tensor in state.model.parameters()):
            torch.cuda.synchronize()
        return copy

    def _kept(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host; the memory is used again in the next save."""
        copy = self._copies.get(key)
        if copy is None:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._copies[key] = copy
        return copy.copy_(tensor, non_blocking=True)

    def _write(self, copy: dict[str, torch.Tensor], steps: int) -> int:
        """Everything that happens beside training; the bytes that all ranks wrote."""
        unfinished = checkpoint_files.unfinished_path(self._folder, steps)
        self._together(self._first_only(lambda: checkpoint_files.prepare(self._folder, steps)))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                writer = FileSystemWriter(unfinished)
                save(copy, storage_writer=writer, process_group=self._mesh.io_group, no_dist=self._alone)
        except CheckpointException as error:
            raise CheckpointFailed(_first_reason(error)) from None
        mine = [f"__{self._mesh.rank}_*.distcp", *([".metadata"] if self._mesh.rank == 0 else [])]
        by_rank = self._together(lambda: checkpoint_files.list_hashed_files(unfinished, mine))
        files = [entry for files in by_rank for entry in files]
        self._together(self._first_only(lambda: self._finish(steps, files)))
        if self._archive:
            self._archive.start()
        return sum(entry.size for entry in files)

    def _finish(self, steps: int, files: list[Any]) -> None:
        checkpoint_files.commit(self._folder, steps, files)
        for old in checkpoint_files.outdated(self._folder, self._keep, self._hours):
            if self._is_elsewhere(old):
                checkpoint_files.remove_checkpoint(self._folder, old)

    def _is_elsewhere(self, steps: int) -> bool:
        """Whether a checkpoint may leave the disk: always, unless there is an archive that does not have it."""
        try:
            return self._archive is None or self._archive.has(steps)
        except InputError:
            return False

    def _newest(self, refused: Set[int], said: list[str]) -> tuple[int, bool] | None:
        """The newest checkpoint as the first rank sees it, and whether it is on disk: else it is archived."""

        def look() -> tuple[int | None, int | None, str]:
            here = max(checkpoint_files.whole(self._folder), default=None)
            try:
                return here, self._archive.newest(refused) if self._archive else None, ""
            except InputError as error:
                if here is None:
                    raise
                return here, None, str(error)

        here, archived, failure = self._together(look)[0]
        if failure:
            said.append(f"the archive cannot be asked, the newest checkpoint on disk is used: {failure}")
        if archived is not None and (here is None or archived > here):
            return archived, False
        return None if here is None else (here, True)

    def _fetch(self, steps: int) -> None:
        """Brings an archived checkpoint here; every rank a share of its files."""
        archive = self._archive
        assert archive is not None
        self._together(self._first_only(lambda: checkpoint_files.prepare(self._folder, steps)))
        self._together(lambda: archive.fetch(steps))
        self._together(self._first_only(lambda: checkpoint_files.publish(self._folder, steps)))

    def _damage(self, steps: int) -> str:
        share = (self._mesh.rank, self._mesh.world)
        return next(filter(None, self._together(lambda: checkpoint_files.damage(self._folder, steps, share))), "")

    def _load(self, state: TrainingState, steps: int) -> tuple[int, int]:
        wanted: dict[str, torch.Tensor] = dict(state.shared())
        for fragment in state.fragments():
            part = StoredPart(fragment.tensor, fragment.offset, fragment.total)
            wanted[f"{fragment.kind}/{fragment.name}"] = part
        wanted[POSITION] = position = torch.zeros(2, dtype=torch.int64)
        _load(wanted, checkpoint_files.path_of(self._folder, steps), self._mesh.io_group, self._alone)
        state.loaded(int(position[0]))
        return int(position[0]), int(position[1])

    @property
    def _alone(self) -> bool:
        return self._mesh.io_group is None

    def _first_only(self, action: Callable[[], None]) -> Callable[[], None]:
        return action if self._mesh.rank == 0 else lambda: None

    def _together(self, action: Callable[[], T]) -> list[T]:
        """What every rank's action gave. Raises CheckpointFailed on all ranks if it failed on any."""
        result, failure = None, ""
        try:
            result = action()
        except Exception as error:  # the other ranks must hear of it, whatever it is
            failure = str(error) or type(error).__name__
        if self._alone:
            everyone: list[Any] = [(result, failure)]
        else:
            everyone = [None] * self._mesh.world
            dist.all_gather_object(everyone, (result, failure), group=self._mesh.io_group)
        if reason := next((failure for _, failure in everyone if failure), ""):
            raise CheckpointFailed(reason)
        return [result for result, _ in everyone]


class _Writing:
    """A save on its way, in a thread that does not keep the process alive."""

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
        except Exception as error:  # whatever it is, training goes on and says it
            reason = str(error) or type(error).__name__
        self._outcome = Saved(self._steps, self._stalled, time.monotonic() - self._began, written, reason)


def read_weights(folder: Path, weights: str = "master") -> Iterator[tuple[str, torch.Tensor]]:
    """(logical name, float32 tensor, flat) of every weight and router bias of a checkpoint, some 256 MB at a time.

    `weights`: the kind, "master" or "ema". Raises CheckpointFailed if the checkpoint has none of these.
    """
    metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    if not any(key.startswith(f"{weights}/") for key in metadata):
        raise CheckpointFailed(f"{folder} has no {weights} weights")
    together: dict[str, torch.Tensor] = {}
    held = 0
    for key, entry in sorted(metadata.items()):
        if key.partition("/")[0] in (weights, "buffer"):
            properties = getattr(entry, "properties")  # noqa: B009 - a union without a common attribute
            together[key] = torch.empty(getattr(entry, "size"), dtype=properties.dtype)  # noqa: B009
            held += together[key].nbytes
        if held >= _TOGETHER:
            yield from _read(together, folder)
            together, held = {}, 0
    yield from _read(together, folder)


def _read(tensors: dict[str, torch.Tensor], folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Fills the tensors, which are named by key; every load reads the checkpoint's whole index."""
    if tensors:
        _load(dict(tensors), folder, None, alone=True)
    for key, tensor in tensors.items():
        yield key.partition("/")[2], tensor


def _load(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None, alone: bool) -> None:
    """Loads in place; in this process only, without the warning that says so, if `alone`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(state, checkpoint_id=str(folder), process_group=group, no_dist=alone)
        except CheckpointException as error:  # a BaseException
            raise CheckpointFailed(f"{folder} cannot be read: {_first_reason(error)}") from None


def _first_reason(error: CheckpointException) -> str:
    """The error of the first rank that had one, without the traceback of all."""
    exception, _ = next(iter(error.failures.values()))
    return str(exception) or type(exception).__name__
