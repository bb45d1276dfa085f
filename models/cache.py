"""The latent cache: the only decode cache (DeepSeek-V2 §2.1.4, DeepSeek-V3 §2.1.1).

Multi-head latent attention caches, per token and layer, one normalised latent and one rotated key shared by all heads:
576 elements in V3 where 128 plain heads would take 40,960. Storage is paged: `[layer, block, slot, latent + rope]`.
The cache hands out blocks; each sequence's table of blocks is kept by the caller.

Notable: `CacheView` resolves a step's positions to slots once, and every layer reuses it.

Shapes: B sequences, T new tokens of each, K blocks, N of them in a table, S slots of a block, C = latent + rope
elements, M written tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.models.config import ModelConfig


class CacheFullError(RuntimeError):
    """The cache has fewer free blocks than were asked for."""


class LatentCache:
    """Paged storage and its free blocks. Blocks are numbered from 0; a freed block keeps its old contents."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"blocks = {blocks} and block_size = {block_size} must be at least 1")
        self.block_size = block_size
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, blocks, block_size, width)
        # Zeros, not garbage: a masked score of NaN would still be NaN.
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(blocks - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def blocks(self) -> int:
        return self.storage.shape[1]

    @property
    def blocks_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` positions."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; CacheFullError, and none taken, when fewer are free."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > len(self._free):
            raise CacheFullError(f"{count} blocks asked for, {len(self._free)} of {self.blocks} free")
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def free(self, blocks: list[int]) -> None:
        """Gives blocks back; ValueError for one that is not allocated."""
        if len(set(blocks)) != len(blocks) or not self._taken.issuperset(blocks):
            raise ValueError(f"blocks {blocks} are not all allocated")
        self._taken.difference_update(blocks)
        self._free.extend(reversed(blocks))

    def view(self, positions_BT: Tensor, tables_BN: Tensor) -> "CacheView":
        """Where the tokens at `positions_BT` (-1: padding) go, and what they may see, by `tables_BN`.

        Entries of a table beyond a sequence's last position are not looked at, so they may be anything (-1, say).
        """
        reach = tables_BN.shape[1] * self.block_size
        if positions_BT.device.type == "cpu" and positions_BT.numel() and int(positions_BT.max()) >= reach:
            raise ValueError(f"position {int(positions_BT.max())} lies beyond the {reach} slots of its block table")
        tables_BN = tables_BN.long().clamp(min=0)
        real_M = (positions_BT >= 0).flatten().nonzero().flatten()
        place_BT = positions_BT.long().clamp(min=0)
        blocks_BT = tables_BN.gather(1, place_BT // self.block_size)
        slots_M = (blocks_BT * self.block_size + place_BT % self.block_size).flatten()[real_M]
        return CacheView(self, real_M, slots_M, tables_BN, positions_BT)


@dataclass(frozen=True)
class CacheView:
    """One step's way into the cache: which tokens are written where, and up to which position each token sees."""

    cache: LatentCache
    real_M: Tensor
    slots_M: Tensor
    tables_BN: Tensor
    positions_BT: Tensor

    def write(self, layer: int, latents_BTC: Tensor) -> None:
        """Stores the real tokens' latents."""
        storage = self.cache.storage[layer].flatten(0, 1)
        real_MC = latents_BTC.flatten(0, 1).index_select(0, self.real_M)
        storage.index_copy_(0, self.slots_M, real_MC.to(storage.dtype))

    def blocks(self, layer: int) -> Tensor:
        """The layer's blocks, of all sequences: [K, S, C]; slots not yet written as they lie."""
        return self.cache.storage[layer]
