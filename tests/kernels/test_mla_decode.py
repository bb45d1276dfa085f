"""Attention over the paged latent cache: Triton against the reference, the reference against a loop in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.mla_decode import DecodeBlocks, mla_decode, mla_decode_reference, mla_decode_triton
from tests.examples import examples
from tests.kernels.compare import draw

SMALL = DecodeBlocks(16, 16, 4, 1)


def _specimen(dtype, heads, tokens=1, slots=64):
    q = torch.zeros(4, tokens, heads, 576, dtype=dtype)
    cache = torch.zeros(64, slots, 576, dtype=dtype)
    tables, positions = torch.zeros(4, 1024 // slots, dtype=torch.int64), torch.zeros(4, tokens, dtype=torch.int64)
    return lambda: mla_decode_triton(q, cache, tables, positions, 0.1, 512)


SPECIMENS = {
    "decode 128 heads": _specimen(torch.bfloat16, 128),
    "decode 16 heads": _specimen(torch.bfloat16, 16),
    "decode blocks of 16": _specimen(torch.bfloat16, 128, slots=16),
    "decode prompt": _specimen(torch.bfloat16, 128, tokens=512),
    "decode fp32": _specimen(torch.float32, 128),
}


def _loop(q, cache, tables, positions, scale, rank):
    """Token by token over the slots one by one, in float64."""
    out = torch.zeros(*q.shape[:3], rank, dtype=torch.float64)
    slots = cache.shape[1]
    for row, token in (positions >= 0).nonzero().tolist():
        reach = range(int(positions[row, token]) + 1)
        seen = torch.stack([cache[tables[row, place // slots], place % slots] for place in reach]).double()
        out[row, token] = (scale * q[row, token].double() @ seen.t()).softmax(-1) @ seen[:, :rank]
    return out


def _case(batch, tokens, heads, widths, slots, dtype, seed, reach=48):
    """Queries, a cache, tables of blocks in any order, and rows of ascending positions, some padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    table = -(-reach // slots)
    q = draw((batch, tokens, heads, sum(widths)), seed=seed, dtype=dtype)
    cache = draw((batch * table + 1, slots, sum(widths)), seed=seed + 1, dtype=dtype)
    tables = torch.randperm(batch * table + 1, generator=generator)[: batch * table].view(batch, table)
    last = torch.randint(tokens - 1, reach, (batch, 1), generator=generator)
    positions = last - torch.arange(tokens - 1, -1, -1)
    padding = torch.randint(0, tokens, (batch, 1), generator=generator)
    positions = positions.masked_fill(torch.arange(tokens) < padding, -1)
    # Entries behind the last block in use may be anything.
    tables = tables.masked_fill(torch.arange(table) > last // slots, -1)
    return q, cache, tables, positions


CASES = {
    "batch": st.sampled_from([1, 2]),
    "tokens": st.sampled_from([1, 2, 3]),
    "heads": st.sampled_from([1, 5, 17]),
    "widths": st.sampled_from([(16, 4), (24, 8), (5, 3), (16, 0)]),
    "slots": st.sampled_from([1, 2, 8, 16, 64]),
    "seed": st.integers(0, 2**31),
}


@given(**CASES)
@settings(max_examples=examples(15))
def test_the_reference_equals_a_loop_over_slots(batch, tokens, heads, widths, slots, seed):
    case = _case(batch, tokens, heads, widths, slots, torch.float64, seed)
    found = mla_decode_reference(*case, 0.4, widths[0])
    torch.testing.assert_close(found, _loop(*case, 0.4, widths[0]), rtol=1e-12, atol=1e-12)


@given(
    **CASES,
    splits=st.sampled_from([None, 1, 2, 5]),
    exponent=st.sampled_from([-2, 0, 4]),
    integers=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=examples(20))
def test_triton_in_fp32_equals_a_loop_over_slots(batch, tokens, heads, widths, slots, seed, splits, exponent, integers):
    q, cache, tables, positions = _case(batch, tokens, heads, widths, slots, torch.float32, seed)
    q = q * 2.0**exponent
    expected = _loop(q, cache, tables, positions, 0.4, widths[0])
    found = mla_decode_triton(
        q, cache, tables.to(integers), positions.to(integers), 0.4, widths[0], blocks=SMALL, splits=splits
    )
    # FP32 scores are off by 2^-24 for each of some addends as large as themselves, weights by as much.
    largest = q.norm(dim=-1).max().item() * cache.norm(dim=-1).max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2.0**-20 * (1 + largest))
    assert not found[positions < 0].any()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("cache_dtype", [None, torch.float32])
def test_rounding_is_that_of_weights_and_results(dtype, unit, cache_dtype):
    """The unit of BF16 is twice what it is on a GPU: Triton's interpreter cuts bits off where a GPU rounds."""
    q, cache, tables, positions = _case(2, 2, 5, (24, 8), 8, dtype, 3)
    expected = _loop(q, cache, tables, positions, 0.2, 24)
    cache = cache.to(cache_dtype or dtype)
    found = mla_decode_triton(q, cache, tables, positions, 0.2, 24, blocks=SMALL, splits=2)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= 2 * unit * cache.abs().max()


def test_invisible_slots_are_not_read():
    q, cache, tables, positions = _case(1, 1, 3, (16, 4), 8, torch.float32, 5)
    positions.fill_(18)
    tables[:] = torch.tensor([0, 1, 2, 10**9, -(10**9), 10**9])
    expected = _loop(q, cache, tables, positions, 0.4, 16)
    cache[2, 3:] = float("nan")
    cache[3:] = float("nan")
    for splits in (1, 3):
        found = mla_decode_triton(q, cache, tables, positions, 0.4, 16, blocks=SMALL, splits=splits)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    cache[1, 0] = float("nan")
    assert mla_decode_triton(q, cache, tables, positions, 0.4, 16, blocks=SMALL, splits=3).isnan().all()


def test_nothing_to_do():
    q, cache, tables, positions = _case(1, 2, 3, (16, 4), 8, torch.float32, 5)
    assert mla_decode_triton(q[:0], cache, tables[:0], positions[:0], 1.0, 16).shape == (0, 2, 3, 16)
    assert not mla_decode_triton(q, cache, tables[:, :0].contiguous(), positions * 0 - 1, 1.0, 16).any()


def test_the_backend_switch(monkeypatch):
    q, cache, tables, positions = _case(1, 2, 3, (16, 4), 8, torch.float32, 5)
    expected = mla_decode(q, cache, tables, positions, 0.4, 16)
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(mla_decode(strided, cache, tables, positions, 0.4, 16), expected, rtol=1e-4, atol=1e-5)
    wide = mla_decode(q.double(), cache.double(), tables, positions, 0.4, 16)
    torch.testing.assert_close(wide, _loop(q, cache, tables, positions, 0.4, 16), rtol=1e-12, atol=1e-12)


def test_wrong_arguments_are_named():
    q, cache, tables, positions = _case(2, 1, 3, (16, 4), 8, torch.float32, 5)
    with pytest.raises(ValueError, match=r"q_BTHC has dtype torch.float64, expected torch.float32 or"):
        mla_decode_triton(q.double(), cache, tables, positions, 1.0, 16)
    with pytest.raises(ValueError, match=r"q_BTHC has strides \(.*\), expected a contiguous tensor"):
        mla_decode_triton(q.transpose(2, 3).contiguous().transpose(2, 3), cache, tables, positions, 1.0, 16)
    with pytest.raises(ValueError, match=r"cache_KSC has shape \(13, 8, 19\), expected \(any, any, 20\)"):
        mla_decode_triton(q, cache[..., 1:].contiguous(), tables, positions, 1.0, 16)
    with pytest.raises(ValueError, match=r"tables_BN has shape \(1, 6\), expected \(2, any\)"):
        mla_decode_triton(q, cache, tables[:1], positions, 1.0, 16)
    with pytest.raises(ValueError, match=r"positions_BT has dtype torch.float32, expected torch.int32 or torch.int64"):
        mla_decode_triton(q, cache, tables, positions.float(), 1.0, 16)
    with pytest.raises(ValueError, match="tables_BN is on device meta, expected cpu"):
        mla_decode_triton(q, cache, tables.to("meta"), positions, 1.0, 16)
    with pytest.raises(ValueError, match="scale = 0, expected a positive number"):
        mla_decode_triton(q, cache, tables, positions, 0, 16)
    with pytest.raises(ValueError, match="rank = 21, expected 1 to 20"):
        mla_decode_triton(q, cache, tables, positions, 1.0, 21)
