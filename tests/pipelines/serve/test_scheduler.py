"""The scheduler with random traffic: its invariants hold in every step."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moray.pipelines.serve.block_pool import BlockPool
from moray.pipelines.serve.detokenizer import TextStream
from moray.pipelines.serve.scheduler import EngineLimits, Scheduler
from moray.pipelines.serve.sequence import Request, Sequence
from tests.examples import examples

SIZE = 8


def sequence(vocabulary, prompt: list[int], max_tokens: int, leader: Sequence | None = None) -> Sequence:
    request = Request(tuple(prompt), max_tokens=max_tokens)
    return Sequence(request, list(prompt), len(prompt), TextStream(vocabulary, ()), None, leader)


def advance(scheduler: Scheduler, pool: BlockPool, chunks) -> list[Sequence]:
    """Executes a plan like the engine, without a model. Returns those that have ended."""
    ended = []
    for chunk in chunks:
        one = chunk.sequence
        assert len(one.blocks) * SIZE >= chunk.end > one.computed
        one.computed = chunk.end
        one.seal_blocks(pool)
        if not one.pending:
            one.ids.append(7)
            if one.generated >= one.request.max_tokens:
                scheduler.remove(one)
                ended.append(one)
    return ended


traffic = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=15
)


@given(traffic, st.integers(1, 5), st.integers(1, 40), st.integers(13, 30), st.one_of(st.none(), st.integers(1, 9)))
@example([(53, 28, 1, 1), (6, 21, 0, 1), (53, 21, 1, 1)], 3, 15, 13, 5)  # the last one finds all but its last id
@settings(max_examples=examples(150), deadline=None)
def test_invariants_hold_under_any_traffic(vocabulary, requests, max_running, extra, blocks, prompt_rows):
    """Prompts of two kinds, so that some share a beginning; some are cancelled; some follow the one before."""
    limits = EngineLimits(step_tokens=max_running + extra, max_running=max_running, block_size=SIZE)
    pool = BlockPool(blocks, SIZE)
    scheduler = Scheduler(pool, limits)
    todo: list[Sequence] = []
    for prompt, most, kind, fate in requests:
        leader = todo[-1] if fate == 4 and todo else None
        ids = todo[-1].ids[: todo[-1].prompt_length] if leader else [kind] * prompt
        todo.append(sequence(vocabulary, ids, most, leader))
    cancelled = {one for one, (*_, fate) in zip(todo, requests, strict=True) if fate == 0}
    ended: set[Sequence] = set()
    for step in range(6000):
        if step < len(todo):
            scheduler.add(todo[step])
        if step >= 3 and step - 3 < len(todo) and todo[step - 3] in cancelled:
            scheduler.remove(todo[step - 3])
        if not scheduler.busy and step >= len(todo) + 3:
            break
        decoding = {one for one in scheduler.sequences if not one.reading}
        chunks = scheduler.plan(prompt_rows)
        assert bool(chunks) == scheduler.busy
        assert sum(chunk.tokens for chunk in chunks) <= limits.step_tokens
        assert len({chunk.sequence for chunk in chunks}) == len(chunks) <= max_running
        if prompt_rows and decoding:
            assert sum(chunk.tokens for chunk in chunks if chunk.sequence not in decoding) <= prompt_rows
        held = {block for one in scheduler.sequences for block in one.blocks}
        assert len(held) == pool.blocks - pool.blocks_free
        written = [block for chunk in chunks for block in chunk.sequence.blocks[chunk.sequence.computed // SIZE :]]
        assert len(set(written)) == len(written)  # nobody writes into a block that another one holds
        ended |= set(advance(scheduler, pool, chunks))
    assert not scheduler.busy
    assert pool.blocks_free == blocks
    assert ended >= set(todo) - cancelled


def test_a_long_prompt_is_read_in_chunks_while_others_decode(vocabulary):
    pool = BlockPool(100, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=10, max_running=4, block_size=SIZE))
    short, long = sequence(vocabulary, [5] * 3, 9), sequence(vocabulary, [6] * 25, 2)
    scheduler.add(short)
    advance(scheduler, pool, scheduler.plan())
    scheduler.add(long)
    sizes = []
    while long.reading:
        chunks = scheduler.plan()
        sizes.append([chunk.tokens for chunk in chunks])
        advance(scheduler, pool, chunks)
    assert sizes == [[1, 9], [1, 9], [1, 7]]


def test_prompts_share_a_step_whatever_their_lengths(vocabulary):
    scheduler = Scheduler(BlockPool(100, SIZE), EngineLimits(step_tokens=40, max_running=4, block_size=SIZE))
    for kind, length in enumerate((12, 10, 12, 9)):
        scheduler.add(sequence(vocabulary, [kind] * length, 2))
    assert [chunk.tokens for chunk in scheduler.plan()] == [12, 10, 12, 6]


def test_a_short_request_is_not_starved_by_long_ones(vocabulary):
    pool = BlockPool(1000, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=40, max_running=4, block_size=SIZE))
    for kind in range(66):
        scheduler.add(sequence(vocabulary, [kind] * 5, 2000))
    for _ in range(200):
        advance(scheduler, pool, scheduler.plan())
    one = sequence(vocabulary, [99], 1)
    scheduler.add(one)
    ended: list[Sequence] = []
    steps = 0
    while one not in ended:
        ended += advance(scheduler, pool, scheduler.plan())
        steps += 1
    assert steps <= 16 * (66 // 4 + 1)  # a turn of those who came before


@pytest.mark.parametrize(("prompt", "most"), [(5, 2000), (20_000, 1)])
def test_a_long_request_has_its_share_beside_short_ones_that_never_end(vocabulary, prompt, most):
    """32 clients ask for 12 ids, again and again. 16 decode at a time."""
    pool = BlockPool(5000, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=80, max_running=16, block_size=SIZE))
    kinds = itertools.count()
    long = sequence(vocabulary, [next(kinds)] * prompt, most)
    scheduler.add(long)
    for _ in range(32):
        scheduler.add(sequence(vocabulary, [next(kinds)] * 2, 12))
    for _ in range(1500):
        for one in advance(scheduler, pool, scheduler.plan()):
            if one is not long:
                scheduler.add(sequence(vocabulary, [next(kinds)] * 2, 12))
    assert long.generated >= 300 or long.closed or long.computed >= 2400  # of 600 to 700 ids, or 4,800 of the prompt


def test_followers_read_only_what_their_leader_did_not(vocabulary):
    pool = BlockPool(100, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=64, max_running=8, block_size=SIZE))
    leader = sequence(vocabulary, [5] * 21, 4)
    followers = [sequence(vocabulary, [5] * 21, 4, leader) for _ in range(3)]
    for one in (leader, *followers):
        scheduler.add(one)
    chunks = scheduler.plan()
    assert [(chunk.sequence, chunk.tokens) for chunk in chunks] == [(leader, 21)]
    advance(scheduler, pool, chunks)
    chunks = scheduler.plan()
    assert [chunk.tokens for chunk in chunks] == [1, 5, 5, 5]
    assert {tuple(chunk.sequence.blocks[:2]) for chunk in chunks} == {tuple(leader.blocks[:2])}
    assert [one.cached for one in followers] == [16] * 3


def test_followers_of_a_leader_that_is_gone_read_for_themselves(vocabulary):
    pool = BlockPool(100, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=64, max_running=8, block_size=SIZE))
    leader = sequence(vocabulary, [5] * 21, 4)
    follower = sequence(vocabulary, [5] * 21, 4, leader)
    for one in (leader, follower):
        scheduler.add(one)
    scheduler.remove(leader)
    assert [chunk.tokens for chunk in scheduler.plan()] == [21]


def test_a_budget_that_decoding_alone_would_use_up_is_refused():
    with pytest.raises(ValueError, match="step_tokens = 8 must exceed max_running = 8"):
        EngineLimits(step_tokens=8, max_running=8)


@pytest.mark.parametrize("noisy", [10, 100])
def test_a_tenant_with_few_requests_does_not_wait_for_one_with_many(vocabulary, noisy):
    """A prompt of the quiet tenant is read after at most two of the noisy one, however many those are."""
    pool = BlockPool(10_000, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=33, max_running=16, block_size=SIZE))
    salts = itertools.count()

    def add(tenant: str) -> Sequence:
        request = Request(tuple([1] * 30), max_tokens=20, tenant=tenant, cache_salt=f"{next(salts)}")
        one = Sequence(request, list(request.prompt), 30, TextStream(vocabulary, ()), None)
        scheduler.add(one)
        return one

    for _ in range(noisy):
        add("noisy")
    for _ in range(7):
        advance(scheduler, pool, scheduler.plan())
    quiet = add("quiet")
    steps = 0
    while quiet.reading:
        advance(scheduler, pool, scheduler.plan())
        steps += 1
    assert steps <= 4


def test_tenants_share_what_is_decoded_whatever_they_send(vocabulary):
    pool = BlockPool(10_000, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=64, max_running=4, block_size=SIZE))
    sequences = []
    for tenant, count in (("a", 12), ("b", 2), ("c", 5)):
        for _ in range(count):
            request = Request((1, 2), max_tokens=10_000, tenant=tenant)
            one = Sequence(request, [1, 2], 2, TextStream(vocabulary, ()), None)
            scheduler.add(one)
            sequences.append(one)
    for _ in range(600):
        advance(scheduler, pool, scheduler.plan())
    had = {name: sum(one.generated for one in sequences if one.request.tenant == name) for name in "abc"}
    assert max(had.values()) - min(had.values()) < 0.1 * sum(had.values())


LONG = [(65, 1900, 100, 2), (65, 1900, 100, 4), (90, 1900, 100, 2), (65, 1000, 1000, 2), (1024, 15_000, 100, 8)]


@pytest.mark.parametrize(("blocks", "prompt", "most", "count"), LONG)
def test_prompts_that_do_not_fit_together_are_read_and_answered(vocabulary, blocks, prompt, most, count):
    """Named after a breaker's finding: each took the other's blocks after every chunk, and none ever decoded."""
    pool = BlockPool(blocks, 32)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=512, max_running=4, block_size=32))
    for kind in range(count):
        request = Request(tuple([kind] * prompt), max_tokens=most)
        scheduler.add(Sequence(request, [kind] * prompt, prompt, TextStream(vocabulary, ()), None))
    read = decoded = 0
    while scheduler.busy:
        for chunk in (chunks := scheduler.plan()):
            chunk.sequence.computed = chunk.end
            read += chunk.tokens if chunk.tokens > 1 else 0
            chunk.sequence.seal_blocks(pool)
        for chunk in chunks:
            if not chunk.sequence.pending:
                decoded += 1
                chunk.sequence.ids.append(7)
                if chunk.sequence.generated == most:
                    scheduler.remove(chunk.sequence)
        assert read <= 3 * count * prompt + 10 * decoded
    assert decoded == count * most


def test_a_small_request_waits_for_no_long_one_that_holds_the_cache(vocabulary):
    pool = BlockPool(640, 32)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=512, max_running=4, block_size=32))
    long = sequence(vocabulary, [1] * 20_000, 480)
    scheduler.add(long)
    while long.reading:
        for chunk in scheduler.plan():
            chunk.sequence.computed = chunk.end
        if not long.pending:
            long.ids.append(7)
    pool.take(pool.blocks_free)  # somebody else's
    small = sequence(vocabulary, [2] * 10, 1)
    scheduler.add(small)
    steps = 0
    while small.pending:
        for chunk in scheduler.plan():
            chunk.sequence.computed = chunk.end
            if chunk.sequence is long and not long.pending:
                long.ids.append(7)
        steps += 1
    assert steps <= 70
    assert len(long.blocks) >= 600  # it has lost no more than was needed


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(0, 10),
    st.integers(1, 6),
)
@settings(max_examples=examples(100), deadline=None)
def test_all_requests_that_fit_alone_end(vocabulary, requests, more, max_running):
    pool = BlockPool(30 + more, SIZE)
    scheduler = Scheduler(pool, EngineLimits(step_tokens=max_running + 16, max_running=max_running, block_size=SIZE))
    for kind, (prompt, most) in enumerate(requests):
        scheduler.add(sequence(vocabulary, [kind] * prompt, most))
    needed = sum(prompt + most for prompt, most in requests)
    steps = 0
    while scheduler.busy:
        advance(scheduler, pool, scheduler.plan())
        steps += 1
        assert steps <= 20 * needed + 64 * len(requests)
