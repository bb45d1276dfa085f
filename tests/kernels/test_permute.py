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
    permute_fp8,
    permute_fp8_reference,
    permute_fp8_triton,
    sum_slots,
    sum_slots_triton,
)
from tests.examples import examples
from tests.kernels.compare import draw, same_bits

IDS = torch.zeros(64, 8, dtype=torch.int64)
ORDER = PaddedOrder(
    torch.zeros(64, 8, dtype=torch.int32),
    torch.zeros(257, dtype=torch.int32),
    torch.zeros(256).int(),
    padded_capacity(64 * 8, 256),
)
FP8 = torch.zeros(64, 512).to(torch.float8_e4m3fn)
SPECIMENS = {
    "padded order": lambda: padded_order_triton(IDS, 256),
    "padded order of many pairs": lambda: padded_order_triton(IDS.repeat(64, 1), 256),
    "permute fp8": lambda: permute_fp8_triton(FP8, torch.zeros(64, 4), ORDER),
    "sum over slots": lambda: sum_slots_triton(FP8.bfloat16(), torch.zeros(8, 8, dtype=torch.int32)),
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
    for implementation in (sum_slots, sum_slots_triton):
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


def test_slots_are_summed_in_fp32_in_their_order():
    # In FP16, 2048 + 1 is 2048; in FP32, 2^24 + 1 - 2^24 is 0 or 1 by the order.
    places_TK = torch.tensor([[2, 0, 1, -1]])
    rows_RD = torch.tensor([[1.0], [0.5], [2048.0], [float("nan")]], dtype=torch.float16)
    assert sum_slots_triton(rows_RD, places_TK).item() == 2050.0  # 2049.5, to nearest
    rows_RD = torch.tensor([[1.0], [-(2.0**24)], [2.0**24], [float("nan")]])
    assert sum_slots_triton(rows_RD, places_TK).item() == 0.0


@given(
    routing=routings(tokens=(0, 1, 7), experts=(1, 5)),
    columns=st.sampled_from([1, 24, 257, 2100]),
    tile=st.sampled_from([4, 16, 128]),
    more=st.sampled_from([0, 9]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(20))
def test_fp8_rows_are_permuted_with_their_scales_and_padded_with_zeros(routing, columns, tile, more, seed):
    ids_TK, experts = routing
    local = int(((ids_TK >= 0) & (ids_TK < experts)).sum())
    order = padded_order_reference(ids_TK, experts, tile, local)
    assert order.offsets_E1[-1] <= order.capacity == padded_capacity(local, experts, tile)
    message_TX = draw((len(ids_TK), columns + more), seed=seed).to(torch.float8_e4m3fn)  # carries more than the numbers
    fp8_TD = message_TX[:, :columns]
    scales_TJ = draw((len(ids_TK), -(-columns // 128)), seed=seed)
    for form in (permute_fp8_triton, permute_fp8_reference):
        fp8_RD, scales_RJ = (rows[: order.offsets_E1[-1]] for rows in form(fp8_TD, scales_TJ, order))
        padding_R = torch.ones(len(fp8_RD), dtype=torch.bool)
        for token, positions in enumerate(order.positions_TK.tolist()):
            for position in positions:
                if position >= 0:
                    same_bits(fp8_RD[position], fp8_TD[token])
                    same_bits(scales_RJ[position], scales_TJ[token])
                    padding_R[position] = False
        assert (fp8_RD[padding_R].float() == 0).all()
        assert (scales_RJ[padding_R] == 1).all()


def test_cpus_run_triton_on_demand(monkeypatch):
    ids_TK = torch.tensor([[0, 2], [-1, 2]])
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MORAY_KERNELS", backend)
        order = padded_order(ids_TK.t().contiguous().t(), 3, 2)
        assert order.positions_TK.tolist() == [[0, 2], [-1, 3]]
        fp8_RD, scales_RJ = permute_fp8(torch.zeros(2, 3).to(torch.float8_e4m3fn), torch.zeros(2, 1), order)
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
    with pytest.raises(ValueError, match="local = 513 pairs, expected 0 to 512, the pairs of expert_ids_TK"):
        padded_order(IDS, 3, local=513)
    order = padded_order(IDS, 3)
    with pytest.raises(ValueError, match=r"fp8_TD has shape \(2, 2\), expected \(64, any\)"):
        permute_fp8(FP8[:2, :2], torch.zeros(2, 1), order)
    with pytest.raises(ValueError, match=r"scales_TJ has shape \(63, 1\), expected \(64, any\)"):
        permute_fp8(FP8, torch.zeros(63, 1), order)
    with pytest.raises(ValueError, match=r"fp8_TD has dtype torch.bfloat16, expected torch.float8_e4m3fn"):
        permute_fp8(FP8.bfloat16(), torch.zeros(64, 4), order)
