import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.padding import group_order, pad_groups, unpad_groups
from tests.examples import examples
from tests.kernels.compare import draw


@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 127, 128, 129, 300]), min_size=1, max_size=6), seed=st.integers(0, 2**31)
)
@settings(max_examples=examples(40))
def test_groups_are_padded_to_multiples_of_128_and_unpadded(counts, seed):
    rows, sizes = sum(counts), [-(-count // 128) * 128 for count in counts]
    x = draw((rows, 3), seed=seed).requires_grad_()
    weights = draw((rows,), seed=seed + 1).requires_grad_()
    padded, padded_weights, order = pad_groups(x, weights, torch.tensor(counts))
    assert order.offsets_E1.tolist() == [sum(sizes[:expert]) for expert in range(len(counts) + 1)]
    packed = 0
    for expert, count in enumerate(counts):
        begin, end = order.offsets_E1[expert : expert + 2].tolist()
        assert torch.equal(padded[begin : begin + count], x[packed : packed + count])
        assert torch.equal(padded_weights[begin : begin + count], weights[packed : packed + count])
        assert not padded[begin + count : end].any()
        assert not padded_weights[begin + count : end].any()
        packed += count
    back = unpad_groups(padded, order)
    assert torch.equal(back, x)
    back.backward(2 * x.detach())
    assert torch.equal(x.grad, 2 * x.detach())
    (padded_weights**2).sum().backward()
    assert torch.equal(weights.grad, 2 * weights.detach())


def test_the_order_is_computed_without_synchronization():
    """Meta tensors have no values, so any synchronization with the device would fail."""
    order = group_order(torch.empty(4, dtype=torch.int64, device="meta"), 1000, torch.device("meta"))
    assert (order.positions_TK.shape, order.offsets_E1.shape) == ((1000, 1), (5,))
    assert order.offsets_E1.dtype == torch.int32
    with pytest.raises(RuntimeError):
        order.offsets_E1.tolist()
