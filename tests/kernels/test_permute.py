import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.permute import (
    PaddedOrder,
    _sum_blocks,
    padded_capacity,
    padded_order,
    padded_order_reference,
    padded_order_triton,
    permute_padded,
    permute_padded_fp8,
    permute_padded_fp8_reference,
    permute_padded_fp8_triton,
    permute_padded_reference,
    permute_padded_triton,
    sum_slots,
    sum_slots_triton,
)
from tests.examples import examples
from tests.kernels.compare import draw, same_bits

IDS = torch.zeros(64, 8, dtype=torch.int64)
ORDER = PaddedOrder(torch.zeros(64, 8, dtype=torch.int32), torch.zeros(257, dtype=torch.int32), torch.zeros(256).int())
X = torch.zeros(64, 512, dtype=torch.bfloat16, requires_grad=True)
CAPACITY = padded_capacity(64 * 8, 256)
SPECIMENS = {
    "padded order": lambda: padded_order_triton(IDS, 256),
    "padded order of many pairs": lambda: padded_order_triton(IDS.repeat(64, 1), 256),
    "permute padded": lambda: permute_padded_triton(X, ORDER, CAPACITY).sum().backward(),
    "permute padded fp8": lambda: permute_padded_fp8_triton(
        X.detach().to(torch.float8_e4m3fn), torch.zeros(64, 4), ORDER, CAPACITY
    ),
}


@st.composite
def routings(draw, tokens=(0, 1, 31, 129), experts=(1, 8, 37, 64, 256)):
    """(ids_TK, experts): even or lopsided, some, all or none of the pairs routed here."""
    number = draw(st.sampled_from(experts))
    shape = (draw(st.sampled_from(tokens)), draw(st.sampled_from([1, 2, 3, 8])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids_TK = torch.randint(0, number, shape, generator=generator)
    kind = draw(st.sampled_from(["even", "one expert", "few experts", "partly", "none"]))
    if kind == "one expert":
        ids_TK = ids_TK[:1, :1].expand(shape).contiguous()
    elif kind == "few experts":
        ids_TK = ids_TK // 8 * 8
    elif kind == "partly":
        ids_TK = torch.where(torch.rand(shape, generator=generator) < 0.5, ids_TK, ids_TK - number)
    elif kind == "none":
        ids_TK = torch.full(shape, -1)
    return ids_TK, number


@given(
    tokens=st.integers(0, 12),
    slots=st.integers(1, 4),
    rows=st.integers(0, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(60), deadline=None)
def test_slots_are_summed_except_absent_ones(tokens, slots, rows, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rows_RD = torch.randint(-30, 31, (rows, 19), generator=generator).to(dtype)
    positions_TK = torch.randint(-1, max(rows, 1), (tokens, slots), generator=generator).clamp(max=rows - 1)
    expected = [[rows_RD[r] for r in row if r >= 0] for row in positions_TK.tolist()]
    for implementation in (sum_slots, lambda x, at: sum_slots_triton(x, None, at)):
        if dtype == torch.float64 and implementation is not sum_slots:
            continue
        found_TD = implementation(rows_RD, positions_TK)
        assert (found_TD.shape, found_TD.dtype) == ((tokens, 19), dtype)
        for total, parts in zip(found_TD, expected, strict=True):
            assert torch.equal(total, sum(parts, torch.zeros(19, dtype=dtype)))


@given(routings(), st.sampled_from([1, 7, 16, 128]))
@settings(max_examples=examples(25))
def test_padded_rows_are_sorted_stably_and_start_at_tiles(routing, tile):
    ids_TK, experts = routing
    expected, end = {}, 0
    order = padded_order_reference(ids_TK, experts, tile)
    flat = ids_TK.flatten().tolist()
    for expert in range(experts):
        mine = [pair for pair, found in enumerate(flat) if found == expert]
        assert order.offsets_E1[expert] == end
        assert order.counts_E[expert] == len(mine)
        expected |= {pair: end + i for i, pair in enumerate(mine)}
        end += -(-len(mine) // tile) * tile
    assert order.offsets_E1[experts] == end <= padded_capacity(len(flat), experts, tile)
    assert order.positions_TK.flatten().tolist() == [expected.get(pair, -1) for pair in range(len(flat))]


@given(routings(), st.sampled_from([1, 7, 128]), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=examples(30))
def test_the_counting_sort_is_the_reference(routing, tile, dtype):
    ids_TK, experts = routing
    found, expected = (f(ids_TK.to(dtype), experts, tile) for f in (padded_order_triton, padded_order_reference))
    same_bits(found.positions_TK, expected.positions_TK)
    same_bits(found.offsets_E1, expected.offsets_E1)
    same_bits(found.counts_E, expected.counts_E)


def test_the_counting_sort_over_several_blocks():
    ids_TK = torch.randint(-1, 5, (431, 3))
    same_bits(padded_order_triton(ids_TK, 5).positions_TK, padded_order_reference(ids_TK, 5).positions_TK)


def test_counts_of_many_blocks_are_summed():
    counts = torch.randint(0, 99, (131, 18), dtype=torch.int32)
    before, total_E = counts.clone(), torch.empty(18, dtype=torch.int32)
    _sum_blocks[(2,)](before, total_E, 131, 18, HEIGHT=64, WIDTH=16)
    assert torch.equal(before, counts.cumsum(0).int() - counts)
    assert torch.equal(total_E, counts.sum(0).int())


def test_ids_of_no_local_expert_are_not_routed():
    ids_TK = torch.tensor([[2**40, 4], [3, -(2**40)]])
    for order in (padded_order_reference(ids_TK, 4), padded_order_triton(ids_TK, 4)):
        assert order.positions_TK.tolist() == [[-1, -1], [0, -1]]
        assert order.offsets_E1.tolist() == [0, 0, 0, 0, 128]


@given(pairs=st.integers(0, 40), experts=st.integers(1, 9), tile=st.integers(1, 9))
@settings(max_examples=examples(40))
def test_the_capacity_is_the_worst_case(pairs, experts, tile):
    begun = min(pairs, experts)
    worst = [1] * begun
    for _ in range(pairs - begun):  # greedily: to an expert whose tile is full
        worst[next((e for e in range(begun) if worst[e] % tile == 0), 0)] += 1
    greedy = sum(-(-count // tile) * tile for count in worst)
    assert greedy <= padded_capacity(pairs, experts, tile) <= -(-pairs // tile) * tile + experts * tile
    first = [1 + pairs - begun] + [1] * (begun - 1) if begun else []
    assert sum(-(-count // tile) * tile for count in first) == padded_capacity(pairs, experts, tile)


def _used(rows_RD, order):
    return rows_RD[: order.offsets_E1[-1]]


@given(
    routing=routings(tokens=(0, 1, 7), experts=(1, 5)),
    width=st.sampled_from([1, 24, 257, 2100]),
    tile=st.sampled_from([4, 16, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(20))
def test_permuted_rows_are_padded_with_zeros_and_gradients_sum_over_slots(routing, width, tile, dtype, seed):
    ids_TK, experts = routing
    order = padded_order_reference(ids_TK, experts, tile)
    capacity = padded_capacity(ids_TK.numel(), experts, tile)
    x_TD = draw((len(ids_TK), width), dtype=dtype, seed=seed).requires_grad_()
    found_RD, expected_RD = (f(x_TD, order, capacity) for f in (permute_padded_triton, permute_padded_reference))
    same_bits(_used(found_RD, order), _used(expected_RD, order))
    grad_RD = draw((capacity, width), dtype=dtype, seed=seed + 1)
    found_TD, expected_TD = (torch.autograd.grad(rows_RD, x_TD, grad_RD)[0] for rows_RD in (found_RD, expected_RD))
    # Another order of at most eight FP32 numbers of about 1, and a step of the dtype: the interpreter cuts BF16 off.
    torch.testing.assert_close(found_TD, expected_TD, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_gradients_sum_in_fp32_in_the_order_of_slots():
    order = padded_order_reference(torch.tensor([[2, 0, 1, -1]]), 3, 1)
    x_TD = torch.zeros(1, 1, dtype=torch.float16, requires_grad=True)
    # In FP16, 2048 + 1 is 2048; in FP32, 2^24 + 1 - 2^24 is 0 or 1 by the order.
    grad_RD = torch.tensor([[1.0], [0.5], [2048.0]], dtype=torch.float16)
    permute_padded_triton(x_TD, order, 4).backward(torch.cat((grad_RD, grad_RD[:1] * float("nan"))))
    assert x_TD.grad.item() == 2050.0  # 2049.5, to nearest
    wide_TD = x_TD.detach().float().requires_grad_()
    grad_RD = torch.tensor([[1.0], [-(2.0**24)], [2.0**24], [float("nan")]])
    permute_padded_triton(wide_TD, order, 4).backward(grad_RD)
    assert wide_TD.grad.item() == 0.0


@given(routing=routings(tokens=(0, 1, 7), experts=(1, 5)), tiles=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=examples(15))
def test_fp8_rows_are_permuted_with_their_scales(routing, tiles, seed):
    ids_TK, experts = routing
    order = padded_order_reference(ids_TK, experts, 16)
    capacity = padded_capacity(ids_TK.numel(), experts, 16)
    fp8_TD = draw((len(ids_TK), 128 * tiles), seed=seed).to(torch.float8_e4m3fn)
    scales_TJ = draw((len(ids_TK), tiles), seed=seed)
    found, expected = (
        f(fp8_TD, scales_TJ, order, capacity) for f in (permute_padded_fp8_triton, permute_padded_fp8_reference)
    )
    same_bits(_used(found[0], order), _used(expected[0], order))
    same_bits(_used(found[1], order), _used(expected[1], order))
    padding_R = torch.ones(int(order.offsets_E1[-1]), dtype=torch.bool)
    padding_R[order.positions_TK[order.positions_TK >= 0].long()] = False
    assert (_used(found[0], order)[padding_R].float() == 0).all()
    assert (_used(found[1], order)[padding_R] == 1).all()


def test_float64_runs_the_reference_and_cpus_run_triton_on_demand(monkeypatch):
    ids_TK = torch.tensor([[0, 2], [-1, 2]])
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MORAY_KERNELS", backend)
        order = padded_order(ids_TK.t().contiguous().t(), 3, 2)
        assert order.positions_TK.tolist() == [[0, 2], [-1, 3]]
        x_TD = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, order=order: permute_padded(x, order, 6), x_TD)
        assert permute_padded(x_TD.float(), order, 6)[1].tolist() == [0.0, 0.0, 0.0]
        fp8_RD, scales_RJ = permute_padded_fp8(torch.zeros(2, 3).to(torch.float8_e4m3fn), torch.zeros(2, 1), order, 6)
        assert (fp8_RD.shape, scales_RJ[:4, 0].tolist()) == ((6, 3), [0.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_wrong_arguments_are_named(monkeypatch, backend):
    monkeypatch.setenv("MORAY_KERNELS", backend)
    with pytest.raises(ValueError, match=r"expert_ids_TK has dtype torch.float32, expected torch.int64 or torch.int32"):
        padded_order(torch.zeros(2, 2), 3)
    with pytest.raises(ValueError, match="num_experts = 0, expected at least 1"):
        padded_order(IDS, 0)
    with pytest.raises(ValueError, match=f"expert_ids_TK may take {2**34 // 8} padded rows, expected at most"):
        padded_order(IDS, 2**31, tile=2**22)
    order = padded_order(IDS, 3)
    with pytest.raises(ValueError, match=r"positions_TK has shape \(64, 8\), expected \(2, any\)"):
        permute_padded(torch.zeros(2, 2), order, 2000)
    with pytest.raises(ValueError, match=r"capacity = 512 rows, expected at least 768 \(padded_capacity\)"):
        permute_padded(torch.zeros(64, 2), order, 512)
    with pytest.raises(ValueError, match=r"scales_TJ has shape \(63, 1\), expected \(64, any\)"):
        permute_padded_fp8(torch.zeros(64, 2).to(torch.float8_e4m3fn), torch.zeros(63, 1), order, 768)
    with pytest.raises(ValueError, match=r"fp8_TD has dtype torch.bfloat16, expected torch.float8_e4m3fn"):
        permute_padded_fp8(X, torch.zeros(64, 4), order, 768)
