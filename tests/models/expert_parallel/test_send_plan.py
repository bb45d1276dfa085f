"""A token is sent once to each rank, and what the ranks return is summed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.models.expert_parallel.send_plan import SendPlan
from tests.examples import examples


@settings(max_examples=examples(200))
@given(
    ranks=st.integers(1, 4),
    local=st.sampled_from([1, 3, 8, 9, 64]),
    tokens=st.integers(0, 7),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_a_token_is_sent_once_to_each_rank_and_results_are_summed(ranks, local, tokens, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    rows_TX = torch.randint(-9, 10, (tokens, 5), generator=generator).to(dtype)
    ids_TK = torch.rand(tokens, ranks * local, generator=generator).argsort(1)[:, :4]
    plan = SendPlan.of(ids_TK, ranks, local)
    counts = plan.send_counts().tolist()
    of_tokens = [sorted({expert // local for expert in row}) for row in ids_TK.tolist()]
    assert sum(counts) == sum(map(len, of_tokens)), "one for each rank, not for each expert"
    sent = plan.gather(rows_TX, sum(counts))
    for rank, received in enumerate(sent.split(counts)):
        expected = [row for row, receivers in zip(rows_TX, of_tokens, strict=True) if rank in receivers]
        assert torch.equal(received, torch.stack(expected) if expected else torch.empty(0, 5, dtype=dtype))
    factors = torch.arange(1.0, ranks + 1).repeat_interleave(torch.tensor(counts)).to(dtype)
    sums = plan.reduce(sent * factors[:, None])
    assert sums.dtype == dtype
    for row, total, receivers in zip(rows_TX, sums, of_tokens, strict=True):
        assert torch.equal(total, row * sum(rank + 1 for rank in receivers))


@pytest.mark.parametrize("local", [1, 8, 13])
def test_a_rank_without_tokens_sends_nothing(local):
    plan = SendPlan.of(torch.empty(0, 2, dtype=torch.int64), 3, local)
    assert plan.send_counts().tolist() == [0, 0, 0]
    assert plan.gather(torch.empty(0, 5), 0).shape == (0, 5)
    assert plan.reduce(torch.empty(0, 5)).shape == (0, 5)
