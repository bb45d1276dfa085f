"""The latent cache, the only cache for decoding (DeepSeek-V2 §2.1.4, DeepSeek-V3 §2.1.1).

Multi-head latent attention caches, per token and layer, one normalized latent and one rotated key shared by all heads:
576 elements in V3, compared with 40,960 for 128 plain heads. Storage is paged: `[layer, block, slot, latent + rope]`.
The caller knows which blocks are free, and each sequence's block table.

Notable: `CacheView` resolves a step's positions to slots once, and every layer reuses it.

Shapes: B sequences, T new tokens of each, K blocks, N of them in a table, S slots of a block, C = latent + rope
elements, M written tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.models.config import ModelConfig


class LatentCache:
    """Paged storage. Blocks are numbered from 0."""

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
        # Zeros, not uninitialized memory: a masked score of NaN would still be NaN. On a CPU, the system provides the
        # memory page by page, as it is written.
        self.storage = torch.zeros(shape, dtype=dtype, device=device)

    def view(self, positions_BT: Tensor, tables_BN: Tensor) -> "CacheView":
        """Maps the tokens at `positions_BT` (-1: padding) to slots and visible positions, by `tables_BN`.

        Entries of a table beyond a sequence's last position are ignored, so they may have any value (-1, for example).
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
    """One step's access to the cache: the slot of each written token, and the last position visible to each token."""

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
        """The layer's blocks, of all sequences: [K, S, C]; unwritten slots have arbitrary contents."""
        return self.cache.storage[layer]
