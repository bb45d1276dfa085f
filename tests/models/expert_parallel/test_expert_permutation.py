"""Received rows are expanded in order for every local expert, and the experts' results are summed for each row."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.fp8_rows import Fp8Rows
from moray.models.expert_parallel.expert_permutation import expert_permutation
from moray.pipelines.pretrain.memory.launches import no_launches
from tests.examples import examples


@settings(max_examples=examples(200))
@given(
    received=st.integers(0, 9),
    slots=st.integers(1, 4),
    local=st.sampled_from([1, 3, 8]),
    fp8=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_rows_are_expanded_by_expert_and_reduced_by_row(received, slots, local, fp8, share, seed):
    generator = torch.Generator().manual_seed(seed)
    ids_AK = torch.randint(0, local, (received, slots), generator=generator)
    ids_AK[torch.rand(received, slots, generator=generator) > share] = -1
    rows_AD = torch.randint(-8, 8, (received, 3), generator=generator).float()
    weights_AK = torch.rand(received, slots, generator=generator)
    pairs = [
        (expert, a, k)
        for expert in range(local)
        for a in range(received)
        for k in range(slots)
        if ids_AK[a, k] == expert
    ]
    order = expert_permutation(ids_AK, local, len(pairs), fp8)
    sent_AD = Fp8Rows(rows_AD.to(torch.float8_e4m3fn), torch.ones(received, 1), torch.float32) if fp8 else rows_AD
    rows_RD, weights_R = order.expand(sent_AD), order.expand_weights(weights_AK)
    assert len(rows_RD) == len(weights_R)
    starts = list(range(len(pairs)))
    if fp8:
        offsets = order.offsets_L1.tolist()
        assert all(offset % 128 == 0 for offset in offsets)
        of_expert = Counter()
        starts = []
        for expert, *_ in pairs:
            starts.append(offsets[expert] + of_expert[expert])
            of_expert[expert] += 1
        assert rows_RD.dequantized().count_nonzero() == rows_RD.dequantized()[starts].count_nonzero()
        assert weights_R.count_nonzero() == weights_R[starts].count_nonzero()
    else:
        assert len(rows_RD) == len(pairs)
    expected_AD = torch.zeros_like(rows_AD)
    for r, (_, a, k) in zip(starts, pairs, strict=True):
        assert torch.equal((rows_RD * 1)[r], rows_AD[a])
        assert weights_R[r] == weights_AK[a, k]
        expected_AD[a] += (r + 1) * rows_AD[a]
    factors_R = torch.arange(1.0, len(rows_RD) + 1)
    assert torch.equal(order.reduce(rows_RD * factors_R[:, None]), expected_AD)
    assert torch.equal(order.to_slots(weights_R), torch.where(ids_AK < 0, 0.0, weights_AK))


@pytest.mark.parametrize("fp8", [False, True])
def test_no_device_synchronization(fp8):
    """Meta tensors have no values, so any synchronization with the device would fail."""
    with no_launches():
        order = expert_permutation(torch.empty(9, 2, dtype=torch.int64, device="meta"), 4, 13, fp8)
        rows_AD = torch.empty(9, 3, device="meta")
        if fp8:
            rows_AD = Fp8Rows(rows_AD.to(torch.float8_e4m3fn), torch.empty(9, 1, device="meta"), torch.float32)
        rows = 512 if fp8 else 13
        assert order.expand(rows_AD).shape == (rows, 3)
        assert order.expand_weights(torch.empty(9, 2, device="meta")).shape == (rows,)
        assert order.to_slots(torch.empty(rows, device="meta")).shape == (9, 2)
