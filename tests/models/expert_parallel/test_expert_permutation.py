"""Received rows are expanded in order for every local expert, and the experts' results are summed for each row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.models.expert_parallel.expert_permutation import ExpertPermutation
from tests.examples import examples


@settings(max_examples=examples(200))
@given(
    received=st.integers(0, 9),
    slots=st.integers(1, 4),
    local=st.sampled_from([1, 3, 8]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_rows_are_expanded_by_expert_and_reduced_by_row(received, slots, local, share, seed):
    generator = torch.Generator().manual_seed(seed)
    ids_AK = torch.randint(0, local, (received, slots), generator=generator)
    ids_AK[torch.rand(received, slots, generator=generator) > share] = -1
    rows_AD = torch.randint(-100, 100, (received, 3), generator=generator).double()
    weights_AK = torch.rand(received, slots, generator=generator)
    pairs = [
        (expert, a, k)
        for expert in range(local)
        for a in range(received)
        for k in range(slots)
        if ids_AK[a, k] == expert
    ]
    order = ExpertPermutation.of(ids_AK, local, len(pairs))
    rows_RD, weights_R = order.expand(rows_AD), order.expand_weights(weights_AK)
    assert (len(rows_RD), len(weights_R)) == (len(pairs), len(pairs))
    expected_AD = torch.zeros_like(rows_AD)
    for r, (_, a, k) in enumerate(pairs):
        assert torch.equal(rows_RD[r], rows_AD[a])
        assert weights_R[r] == weights_AK[a, k]
        expected_AD[a] += (r + 1) * rows_AD[a]
    factors_R = torch.arange(1.0, len(pairs) + 1)
    assert torch.equal(order.reduce(rows_RD * factors_R[:, None]), expected_AD)
    assert torch.equal(order.to_slots(weights_R), torch.where(ids_AK < 0, 0.0, weights_AK))


def test_no_device_synchronization():
    """Meta tensors have no values, so any synchronization with the device would fail."""
    order = ExpertPermutation.of(torch.empty(9, 2, dtype=torch.int64, device="meta"), 4, 13)
    assert order.expand(torch.empty(9, 3, device="meta")).shape == (13, 3)
    assert order.expand_weights(torch.empty(9, 2, device="meta")).shape == (13,)
    assert order.to_slots(torch.empty(13, device="meta")).shape == (9, 2)
