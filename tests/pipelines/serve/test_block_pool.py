"""Blocks: held, shared, kept and taken again."""

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import data, integers

from moray.pipelines.serve.block_pool import BlockPool, PoolEmptyError, next_key
from tests.examples import examples


def test_blocks_are_taken_once_and_released():
    pool = BlockPool(4, 4)
    first = pool.take(3)
    with pytest.raises(PoolEmptyError, match="2 blocks requested, 1 of 4 free"):
        pool.take(2)
    assert pool.blocks_free == 1
    pool.release(first[:2])
    assert not set(pool.take(3)) & {first[2]}


def test_releasing_a_block_that_is_not_held_is_refused():
    pool = BlockPool(4, 4)
    taken = pool.take(2)
    for blocks in ([3], [taken[0], taken[0]]):
        with pytest.raises(ValueError, match="not all held"):
            pool.release(blocks)
    assert pool.blocks_free == 2


def test_blocks_for_rounds_up():
    assert [BlockPool(1, 4).blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="blocks = 0"):
        BlockPool(0, 4)


def test_a_key_depends_on_all_ids_up_to_its_end():
    one = next_key(b"", [1, 2, 3])
    assert next_key(one, [4, 5, 6]) == next_key(next_key(b"", [1, 2, 3]), [4, 5, 6])
    assert len({one, next_key(b"", [1, 2, 4]), next_key(one, [1, 2, 3]), next_key(b"", [1, 2])}) == 4


def test_contents_are_found_until_the_block_is_needed():
    pool = BlockPool(3, 4)
    keys = [next_key(b"", [1]), next_key(b"", [2])]
    blocks = pool.take(2)
    for block, key in zip(blocks, keys, strict=True):
        pool.seal(block, key)
    pool.release(blocks)
    assert pool.blocks_free == 3
    assert pool.find(keys) == blocks
    assert pool.find(keys[:1]) == blocks[:1]  # held twice
    pool.release(blocks)
    assert pool.blocks_free == 2
    pool.release(blocks[:1])
    assert pool.take(1) == [2]  # one that was never used, before one with contents
    assert pool.take(1) == [blocks[1]]  # unused for longest
    assert pool.find(keys) == blocks[:1]
    pool.release(blocks[:1], forget=True)
    assert pool.find(keys) == []


class Traffic(RuleBasedStateMachine):
    """Holders that take, seal, find and release at random: no block is lost, or in two hands with other contents."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(6, 4)
        self.held: list[list[int]] = []
        self.contents: dict[int, bytes] = {}
        self.sealed: dict[int, bytes] = {}

    @rule(count=integers(0, 4))
    def take(self, count):
        if count > self.pool.blocks_free:
            with pytest.raises(PoolEmptyError):
                self.pool.take(count)
            return
        taken = self.pool.take(count)
        assert not any(block in holder for holder in self.held for block in taken)
        for block in taken:
            self.sealed.pop(block, None)
        self.held.append(taken)

    @precondition(lambda self: any(self.held))
    @rule(data=data())
    def seal(self, data):
        holder = data.draw(integers(0, len(self.held) - 1))
        for block in self.held[holder]:
            if block not in self.sealed:
                key = next_key(b"", [data.draw(integers(0, 5))])
                if key not in self.sealed.values():
                    self.sealed[block] = key
                self.pool.seal(block, key)

    @rule(name=integers(0, 5))
    def find(self, name):
        key = next_key(b"", [name])
        found = self.pool.find([key])
        for block in found:
            assert self.sealed[block] == key
        if found:
            self.held.append(found)

    @precondition(lambda self: bool(self.held))
    @rule(data=data())
    def release(self, data):
        holder = self.held.pop(data.draw(integers(0, len(self.held) - 1)))
        forget = data.draw(integers(0, 3)) == 0
        if forget:
            for block in holder:
                self.sealed.pop(block, None)
        self.pool.release(holder, forget)

    @invariant()
    def none_is_lost(self):
        assert self.pool.blocks_free == 6 - len({block for holder in self.held for block in holder})


Traffic.TestCase.settings = settings(max_examples=examples(60), deadline=None)
TestTraffic = Traffic.TestCase
