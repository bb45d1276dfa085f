"""One copy of a row for each rank: what arrives, expanded, is what a copy for each expert would have been."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.models.copies import Copies, expand


@settings(max_examples=200)
@given(
    ranks=st.integers(1, 4),
    local=st.sampled_from([1, 3, 8, 9, 64]),
    tokens=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]),
)
def test_rows_arrive_at_every_expert_in_order(ranks, local, tokens, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    slots = min(4, ranks * local)
    sent, expected = [], [[[] for _ in range(local)] for _ in range(ranks)]
    for source in range(ranks):
        rows_TX = torch.randint(0, 200, (tokens[source], 5), generator=generator).to(dtype)
        ids_TK = torch.rand(tokens[source], ranks * local, generator=generator).argsort(1)[:, :slots]
        copies = Copies.of(ids_TK, ranks, local)
        counts = copies.counts_P().tolist()
        sent.append(copies.made(rows_TX, sum(counts)).split(counts))
        distinct = [len({expert // local for expert in row}) for row in ids_TK.tolist()]
        assert sum(counts) == sum(distinct), "one for each rank, not for each expert"
        for row, experts in zip(rows_TX, ids_TK.tolist(), strict=True):
            for expert in experts:
                expected[expert // local][expert % local].append(row)
    for rank in range(ranks):
        arrived = torch.cat([sent[source][rank] for source in range(ranks)])
        rows = [row for of_expert in expected[rank] for row in of_expert]
        found = expand(arrived, torch.empty(0, 5, dtype=dtype), local, len(rows))
        assert found.dtype == dtype
        assert torch.equal(found, torch.stack(rows) if rows else torch.empty(0, 5, dtype=dtype))


@pytest.mark.parametrize("local", [1, 8, 13])
def test_a_rank_without_tokens_sends_nothing(local):
    copies = Copies.of(torch.empty(0, 2, dtype=torch.int64), 3, local)
    assert copies.counts_P().tolist() == [0, 0, 0]
    assert copies.made(torch.empty(0, 5), 0).shape == (0, 20 + -(-local // 8))
