"""The blocks of a latent cache: free, held by sequences, or kept for their contents.

A block that is full has a key: the hash of all ids up to its end. Sequences with the same beginning hold the same
blocks. A block that nobody holds keeps its key until it is needed; those unused for longest are taken first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

Key = bytes


class PoolEmptyError(RuntimeError):
    """The pool has fewer free blocks than requested."""


class BlockPool:
    """Pure bookkeeping: the contents are in a `LatentCache`. blocks: number of blocks, of `block_size` positions."""

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"blocks = {blocks} and block_size = {block_size} must be at least 1")
        self.blocks, self.block_size = blocks, block_size
        self._unused = deque(range(blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()  # nobody holds them; unused for longest first
        self._holders: dict[int, int] = {}
        self._keys: dict[int, Key] = {}
        self._by_key: dict[Key, int] = {}
        self._fresh: list[int] = []

    @property
    def blocks_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._unused) + len(self._kept)

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def take(self, count: int) -> list[int]:
        """Blocks for new contents. Raises PoolEmptyError, and takes none, if fewer are free."""
        if count > self.blocks_free:
            raise PoolEmptyError(f"{count} blocks requested, {self.blocks_free} of {self.blocks} free")
        taken = [self._unused.popleft() if self._unused else self._evict() for _ in range(count)]
        self._holders |= dict.fromkeys(taken, 1)
        self._fresh += taken
        return taken

    def fresh(self) -> list[int]:
        """The blocks taken since the last call, which may have old contents."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def find(self, keys: Iterable[Key]) -> list[int]:
        """Holds and returns the blocks of the first keys, up to the first one that is not here."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            found.append(block)
        return found

    def seal(self, block: int, key: Key) -> None:
        """Declares that a held block is full. If another one has the same key, that one stays the block of the key."""
        if block not in self._keys and key not in self._by_key:
            self._keys[block], self._by_key[key] = key, block

    def release(self, blocks: Sequence[int], forget: bool = False) -> None:
        """Gives up one hold of each block, the last block being the first to be taken again. forget: their contents
        are not to be found any more. Raises ValueError for a block that is not held."""
        if len(set(blocks)) != len(blocks) or not self._holders.keys() >= set(blocks):
            raise ValueError(f"blocks {list(blocks)} are not all held")
        for block in reversed(blocks):
            if forget:
                self._unseal(block)
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._keys:
                self._kept[block] = None
            else:
                self._unused.append(block)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        self._unseal(block)
        return block

    def _unseal(self, block: int) -> None:
        if (key := self._keys.pop(block, None)) is not None:
            del self._by_key[key]


def next_key(before: Key, ids: Sequence[int]) -> Key:
    """The key of a block with these ids, after the block of `before` (empty for the first)."""
    return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()
