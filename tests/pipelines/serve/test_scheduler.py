"""The scheduler with random traffic: its invariants hold in every step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.serve.scheduler import EngineLimits, Scheduler
from moray.pipelines.serve.sequence import Request, Sequence
from tests.examples import examples


class Pool:
    """Blocks without a cache behind them."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self._size = block_size
        self.out: set[int] = set()

    @property
    def blocks_free(self) -> int:
        return self.blocks - len(self.out)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._size)

    def allocate(self, count: int) -> list[int]:
        taken = sorted(set(range(self.blocks)) - self.out)[:count]
        assert len(taken) == count
        self.out.update(taken)
        return taken

    def free(self, blocks: list[int]) -> None:
        assert self.out.issuperset(blocks)
        self.out.difference_update(blocks)


def sequence(vocabulary, prompt: int, max_tokens: int) -> Sequence:
    from moray.pipelines.serve.detokenizer import TextStream

    request = Request(tuple([5] * prompt), max_tokens=max_tokens)
    return Sequence(request, [5] * prompt, prompt, TextStream(vocabulary), None)


def advance(scheduler: Scheduler, chunks) -> None:
    """Executes a plan like the engine, without a model."""
    for chunk in chunks:
        chunk.sequence.computed = chunk.end
        if not chunk.sequence.prefilling:
            chunk.sequence.ids.append(7)
            if chunk.sequence.generated >= chunk.sequence.request.max_tokens:
                scheduler.remove(chunk.sequence)


traffic = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20), st.booleans()), min_size=1, max_size=15)


@given(traffic, st.integers(1, 5), st.integers(1, 40), st.integers(10, 30))
@settings(max_examples=examples(150), deadline=None)
def test_invariants_hold_under_any_traffic(vocabulary, requests, max_running, extra, blocks):
    limits = EngineLimits(step_tokens=max_running + extra, max_running=max_running, block_size=8)
    pool = Pool(blocks, 8)
    scheduler = Scheduler(pool, limits)
    todo = [(sequence(vocabulary, p, m), cancelled) for p, m, cancelled in requests]
    order = [one for one, _ in todo]
    started: list[Sequence] = []
    for step in range(2000):
        if step < len(todo):
            scheduler.add(todo[step][0])
        if step >= 3 and step - 3 < len(todo) and todo[step - 3][1]:
            scheduler.remove(todo[step - 3][0])
            order.remove(todo[step - 3][0]) if todo[step - 3][0] not in started else None
        if not scheduler.busy and step >= len(todo) + 3:
            break
        plan = scheduler.plan()
        started += [chunk.sequence for chunk in plan.prefill if chunk.sequence not in started]
        padded = len(plan.prefill) * max((chunk.tokens for chunk in plan.prefill), default=0)
        assert padded + len(plan.decode) <= limits.step_tokens
        assert len(scheduler.running) <= max_running
        assert plan.prefill or plan.decode or not scheduler.busy
        assert {chunk.sequence for chunk in plan.decode} == {s for s in scheduler.running if not s.prefilling}
        held = [block for one in scheduler.running for block in one.blocks]
        assert sorted(held) == sorted(pool.out)
        assert all(len(one.blocks) * 8 >= one.reserved_positions for one in scheduler.running)
        assert all(chunk.end <= chunk.sequence.reserved_positions for chunk in plan.prefill + plan.decode)
        advance(scheduler, plan.prefill + plan.decode)
    assert not scheduler.busy
    assert pool.blocks_free == blocks
    assert started == [one for one in order if one in started]  # first come, first served


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode(vocabulary):
    scheduler = Scheduler(Pool(100, 8), EngineLimits(step_tokens=10, max_running=4, block_size=8))
    short, long = sequence(vocabulary, 3, 9), sequence(vocabulary, 25, 2)
    scheduler.add(short)
    advance(scheduler, scheduler.plan().prefill)
    scheduler.add(long)
    sizes = []
    while long.prefilling:
        plan = scheduler.plan()
        sizes.append((len(plan.decode), [chunk.tokens for chunk in plan.prefill]))
        advance(scheduler, plan.prefill + plan.decode)
    assert sizes == [(1, [9]), (1, [9]), (1, [7])]


def test_prompts_of_like_length_share_a_step(vocabulary):
    scheduler = Scheduler(Pool(100, 8), EngineLimits(step_tokens=40, max_running=4, block_size=8))
    for length in (12, 10, 12, 3):
        scheduler.add(sequence(vocabulary, length, 2))
    assert [chunk.tokens for chunk in scheduler.plan().prefill] == [12, 10, 12]


def test_a_budget_that_decoding_alone_would_use_up_is_refused():
    with pytest.raises(ValueError, match="step_tokens = 8 must exceed max_running = 8"):
        EngineLimits(step_tokens=8, max_running=8)
