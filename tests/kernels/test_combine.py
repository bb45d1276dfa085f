import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.combine import combine_padded, combine_padded_reference, combine_padded_triton
from moray.kernels.permute import PaddedOrder, padded_capacity, padded_order, padded_order_reference
from tests.examples import examples
from tests.kernels.compare import draw
from tests.kernels.test_permute import CAPACITY, ORDER, routings

ROWS = torch.zeros(CAPACITY, 512, dtype=torch.bfloat16, requires_grad=True)
WEIGHTS = torch.zeros(64, 8, requires_grad=True)
WIDE_ROWS = torch.zeros(CAPACITY, 7168, dtype=torch.bfloat16, requires_grad=True)
SPECIMENS = {
    "combine padded": lambda: combine_padded_triton(ROWS, WEIGHTS, ORDER).sum().backward(),
    "combine padded wide": lambda: combine_padded_triton(WIDE_ROWS, WEIGHTS, ORDER).sum().backward(),
}


@given(
    routing=routings(tokens=(0, 1, 7), experts=(1, 5)),
    width=st.sampled_from([1, 24, 257, 2100]),
    tile=st.sampled_from([4, 16, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(30))
def test_triton_gives_the_weighted_sum_and_its_gradients(routing, width, tile, dtype, seed):
    ids_TK, experts = routing
    order = padded_order_reference(ids_TK, experts, tile)
    capacity = padded_capacity(ids_TK.numel(), experts, tile)
    rows_RD = draw((capacity, width), dtype=dtype, seed=seed)
    rows_RD[int(order.offsets_E1[-1]) :] = float("nan")  # nobody may read them
    rows_RD.requires_grad_()
    weights_TK = draw(ids_TK.shape, seed=seed + 1).requires_grad_()
    grad_TD = draw((len(ids_TK), width), dtype=dtype, seed=seed + 2)
    found_TD, expected_TD = (f(rows_RD, weights_TK, order) for f in (combine_padded_triton, combine_padded_reference))
    # At most eight FP32 products of about 1, rounded once or twice, and a step of the dtype.
    step = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(found_TD, expected_TD, **step)
    found, expected = (torch.autograd.grad(out, (rows_RD, weights_TK), grad_TD) for out in (found_TD, expected_TD))
    used = int(order.offsets_E1[-1])
    torch.testing.assert_close(found[0][:used], expected[0][:used], **step)
    # A sum over `width` products of about 1 in another order.
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6 * width)
    assert (found[1][order.positions_TK < 0] == 0).all()


@pytest.mark.parametrize("implementation", [combine_padded_reference, combine_padded_triton])
def test_slots_of_other_ranks_add_nothing_whatever_their_weight(implementation):
    order = padded_order(torch.tensor([[1, -1]]), 2, 2)
    rows_RD = torch.tensor([[3.0], [0.0], [0.0], [0.0]], requires_grad=True)
    weights_TK = torch.tensor([[2.0, float("nan")]], requires_grad=True)
    out_TD = implementation(rows_RD, weights_TK, order)
    assert out_TD.tolist() == [[6.0]]
    out_TD.backward(torch.full((1, 1), float("inf")))
    assert rows_RD.grad[:2].tolist() == [[float("inf")], [0.0]]
    assert weights_TK.grad.tolist() == [[float("inf"), 0.0]]


def test_float64_combines_by_the_reference_and_cpus_run_triton_on_demand(monkeypatch):
    order = padded_order(torch.tensor([[0, 2], [-1, 2]]), 3, 2)
    rows_RD = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    assert torch.autograd.gradcheck(lambda rows, weights: combine_padded(rows, weights, order), (rows_RD, weights_TK))
    narrow_TD = combine_padded(rows_RD.float().t().contiguous().t(), weights_TK.float().t().contiguous().t(), order)
    torch.testing.assert_close(narrow_TD, combine_padded(rows_RD, weights_TK, order).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", [combine_padded_reference, combine_padded_triton])
def test_wrong_arguments_are_named(implementation):
    order = padded_order(torch.zeros(5, 2, dtype=torch.int64), 3)
    rows_RD, weights_TK = torch.zeros(padded_capacity(10, 3), 4), torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"weights_TK has shape \(2, 5\), expected \(5, 2\)"):
        implementation(rows_RD, weights_TK.view(2, 5), order)
    with pytest.raises(ValueError, match=r"weights_TK has dtype torch.bfloat16, expected torch.float32"):
        implementation(rows_RD, weights_TK.bfloat16(), order)
    with pytest.raises(ValueError, match=r"weights_TK is on device meta, expected cpu"):
        implementation(rows_RD, weights_TK.to("meta"), order)
    with pytest.raises(ValueError, match=r"rows_RD has dtype torch.int32, expected torch.float32 or"):
        implementation(rows_RD.int(), weights_TK, order)
    with pytest.raises(ValueError, match=r"rows_RD has strides \(1, 384\), expected a contiguous tensor"):
        implementation(torch.zeros(4, 384).t(), weights_TK, order)
    with pytest.raises(ValueError, match=r"capacity = 383 rows, expected at least 384"):
        implementation(rows_RD[:383], weights_TK, order)
    with pytest.raises(ValueError, match=r"offsets_E1 has shape \(3,\), expected \(4\)"):
        implementation(rows_RD, weights_TK, PaddedOrder(order.positions_TK, order.offsets_E1[:3], order.counts_E))
