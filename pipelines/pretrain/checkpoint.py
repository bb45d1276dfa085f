"""Checkpoints by torch.distributed.checkpoint, in logical tensors: one key per parameter and one per expert.

A checkpoint is written beside its place and renamed when every rank is done, so a folder named `step-...` is whole.
What it holds does not depend on how many ranks wrote it: a rank asks for the keys it holds, whoever wrote them.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.optimizer import ShardedOptimizer
from moray.pipelines.pretrain.stored import StoredPart

# The schedule position: steps taken, tokens seen. The data cursor is the step; nothing here draws random numbers
# after initialisation, so there is no generator state to keep.
POSITION = "position"


class Checkpoints:
    """The checkpoints of one run under `folder`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, model: DeepseekV3, optimizer: ShardedOptimizer, steps: int, tokens: int) -> None:
        """Writes the checkpoint after `steps` steps; all ranks call it. Older ones beyond `keep` are removed."""
        unfinished, final = self._folder / f".step-{steps:08d}", self.path(steps)
        state = _state(model, optimizer)
        state[POSITION] = torch.tensor([steps, tokens], dtype=torch.int64)
        if _is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        _barrier()
        save(state, checkpoint_id=str(unfinished), no_dist=not dist.is_initialized())
        _barrier()
        if _is_first():
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            for old in list(self.complete())[: -self._keep]:
                shutil.rmtree(self.path(old))
        _barrier()

    def restore(self, model: DeepseekV3, optimizer: ShardedOptimizer) -> tuple[int, int]:
        """Loads the newest whole checkpoint in place; returns (steps, tokens), or (0, 0) if there is none."""
        newest = max(self.complete(), default=None)
        if newest is None:
            return 0, 0
        state = _state(model, optimizer)
        state[POSITION] = torch.zeros(2, dtype=torch.int64)
        load(state, checkpoint_id=str(self.path(newest)), no_dist=not dist.is_initialized())
        optimizer.refresh_weights()
        steps, tokens = (int(value) for value in state[POSITION])
        optimizer.set_steps(steps)
        return steps, tokens

    def path(self, steps: int) -> Path:
        return self._folder / f"step-{steps:08d}"

    def complete(self) -> Iterator[int]:
        """The steps of all whole checkpoints, ascending."""
        yield from sorted(int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*"))


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(logical name, float32 tensor, flat) of every weight and router bias of a checkpoint, one at a time."""
    metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    for key, entry in sorted(metadata.items()):
        kind, _, name = key.partition("/")
        if kind in ("master", "buffer"):
            properties = getattr(entry, "properties")  # noqa: B009 - a union without a common attribute
            tensor = torch.empty(getattr(entry, "size"), dtype=properties.dtype)  # noqa: B009
            _load_alone({key: tensor}, folder)
            yield name, tensor


def _load_alone(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Loads in this process only, without the warning that says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, checkpoint_id=str(folder), no_dist=True)


def _state(model: DeepseekV3, optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    """Live tensors under `kind/logical name`. Ranks that hold the same elements of a key hold the same values."""
    state: dict[str, torch.Tensor] = {}
    for fragment in optimizer.fragments():
        part = StoredPart(fragment.tensor, fragment.offset, fragment.total)
        state[f"{fragment.kind}/{fragment.name}"] = part
    for name, buffer in model.logical_biases():
        state[f"buffer/{name}"] = buffer
    return state


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
