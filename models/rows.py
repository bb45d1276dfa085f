"""The forward that an inference engine calls: tokens of many sequences, over the latent cache.

`CompiledModel` (`compiled.py`) and `EagerModel` implement it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from moray.models.cache import LatentCache
from moray.models.config import ModelConfig


class Span(NamedTuple):
    """Consecutive tokens of one sequence, at positions `start` and on; the sequence's block table; and how many of the
    last tokens' logits are wanted."""

    ids: Sequence[int]
    start: int
    table: Sequence[int]
    wanted: int


@dataclass(frozen=True)
class RowLogits:
    """logits_WV: FP32, or FP64 for an FP64 model, one row per wanted token, in order. hidden_WD: the states
    that the head turns into them, after the last norm.

    best: the id of each row's largest logit, the first among equal ones, or -1 if a logit is not finite.
    """

    logits_WV: Tensor
    best: list[int]
    hidden_WD: Tensor


class RowModel(Protocol):
    config: ModelConfig

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the cache."""

    def expert_rows(self) -> Tensor:
        """Rows computed by each expert of each layer since the start, int64 [L, E]; zeros in dense layers."""

    def cache(self, blocks: int, block_size: int) -> LatentCache:
        """A cache for `forward`."""

    def forward(self, spans: Sequence[Span], cache: LatentCache) -> RowLogits:
        """Writes the tokens' latents into the cache, and returns the logits that are wanted, which are valid until the
        next call. Each token attends to all positions of its sequence up to its own."""
