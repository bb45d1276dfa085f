"""Host memory for the state that a rank writes, which every save fills again.

Training waits for this copy, so it does little in Python: the buffers, and what torch asks of them, are made once, and
one call of torch copies all tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moray.kernels.util.device import runtime
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart
from moray.pipelines.pretrain.checkpoint.training_state import TrainingState

# The position in training: steps and tokens. The step is also the data cursor. Training draws no random numbers after
# initialisation, so there is no generator state to store.
POSITION = "position"


class HostCopy:
    """A copy of the tensors that a rank writes, by checkpoint key."""

    def __init__(self, shared: bool) -> None:
        """shared: also the state that is equal on all ranks, and the position."""
        self._shared = shared
        self._parts: dict[str, StoredPart] = {}

    def update(self, state: TrainingState, steps: int, tokens: int) -> dict[str, StoredPart]:
        """Copies the state, and waits until it is copied. The result is the same object as long as keys, offsets,
        sizes and dtypes stay as they were; its tensors are overwritten by the next call."""
        found: dict[str, StoredPart] = {}
        targets, sources = [], []
        for key, offset, total, source in self._sources(state, steps, tokens):
            part = self._parts.get(key)
            if part is None or not part.fits(source, offset, total):
                part = StoredPart(runtime(source.device).host_tensor(source.shape, source.dtype), offset, total)
            found[key] = part
            targets.append(part.part)
            sources.append(source)
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        runtime(state.model.lm_head.weight.device).synchronize()
        if found.keys() != self._parts.keys() or any(found[key] is not part for key, part in self._parts.items()):
            self._parts = found
        return self._parts

    def _sources(self, state: TrainingState, steps: int, tokens: int) -> Iterator[tuple[str, int, int, torch.Tensor]]:
        """(key, offset in the whole tensor, elements of the whole tensor, flat tensor)."""
        for fragment in state.fragments(owned=True):
            yield f"{fragment.kind}/{fragment.name}", fragment.offset, fragment.total, fragment.tensor
        if self._shared:
            for key, tensor in state.shared():
                yield key, 0, len(tensor), tensor
            yield POSITION, 0, 2, torch.tensor([steps, tokens], dtype=torch.int64)
