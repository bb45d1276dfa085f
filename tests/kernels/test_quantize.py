import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.quantize import (
    E4M3_MAX,
    check_scales,
    dequantize,
    dequantize_reference,
    dequantize_triton,
    fp8_to_bf16,
    quantize,
    quantize_both_reference,
    quantize_both_triton,
    quantize_reference,
    quantize_triton,
)
from moray.kernels.wire import pack_rows_reference
from tests.examples import examples
from tests.kernels.compare import draw, same_bits

BLOCKS = [(1, 128), (128, 1), (128, 128)]
# Every non-negative E4M3 number.
GRID = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
X = torch.zeros(256, 512, dtype=torch.bfloat16)
FP8 = torch.zeros(256, 512, dtype=torch.float8_e4m3fn)
SPECIMENS = {
    "quantize row tiles": lambda: quantize_triton(X, (1, 128), power_of_two=True),
    "quantize column tiles": lambda: quantize_triton(X, (128, 1), power_of_two=True),
    "quantize weight": lambda: quantize_triton(X.float(), (128, 128)),
    "dequantize row tiles": lambda: dequantize_triton(FP8, torch.ones(256, 4), dtype=torch.bfloat16),
    "dequantize weight": lambda: dequantize_triton(FP8, torch.ones(2, 4), (128, 128), torch.bfloat16),
    "quantize both": lambda: quantize_both_triton(X, power_of_two=True),
}


def _nearest(values):
    """The nearest E4M3 numbers in float64, ties to the even mantissa."""
    magnitude = values.abs()
    above = torch.searchsorted(GRID, magnitude).clamp(max=len(GRID) - 1)
    below = (above - 1).clamp(min=0)
    up, down = GRID[above] - magnitude, magnitude - GRID[below]
    tie_up = above % 2 == 0
    pick = torch.where((up < down) | ((up == down) & tie_up), above, below)
    return GRID[pick] * values.sign()


def _expand(scales, block, shape):
    return scales.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[0], : shape[1]]


@given(
    block=st.sampled_from(BLOCKS),
    rows=st.sampled_from([1, 2, 127, 128, 131]),
    columns=st.sampled_from([1, 7, 128, 129, 257]),
    stack=st.sampled_from([(), (2,)]),
    exponent=st.sampled_from([-100, -30, -3, 0, 20, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    power_of_two=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(60), deadline=None)
def test_every_number_is_the_nearest_and_nothing_saturates(
    block, rows, columns, stack, exponent, dtype, power_of_two, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*stack, rows, columns, generator=generator) * 2.0**exponent).to(dtype)
    fp8, scales = quantize(x, block, power_of_two)
    check_scales(fp8, scales, block)
    expanded = _expand(scales, block, (rows, columns))
    # The quotient is FP32's, which is what a kernel computes.
    quotient = (x.float() / expanded.float()).double().clamp(-E4M3_MAX, E4M3_MAX)
    assert torch.equal(fp8.double(), _nearest(quotient))
    assert torch.equal(dequantize(fp8, scales, block).double(), (fp8.double() * expanded).float().double())
    largest = x.double().abs().amax((-2, -1))
    assert (expanded.amax((-2, -1)) >= largest / E4M3_MAX * (1 - 2**-23)).all()
    if power_of_two:
        assert (torch.frexp(scales).mantissa == 0.5).all()
        assert (expanded.amax((-2, -1)) < 2 * largest / E4M3_MAX * (1 + 2**-23)).all()


def test_every_fp8_number_converts_to_bf16_exactly():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    same_bits(fp8_to_bf16(numbers), numbers.bfloat16())


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_without_columns_and_no_rows(block):
    for shape in ((0, 5), (5, 0), (0, 0)):
        fp8, scales = quantize(torch.zeros(shape), block)
        assert fp8.shape == shape
        check_scales(fp8, scales, block)
        assert dequantize(fp8, scales, block).shape == shape


@pytest.mark.parametrize("power_of_two", [False, True])
def test_extreme_values(power_of_two):
    def roundtrip(*values):
        x = torch.tensor([values])
        return dequantize(*quantize(x, (1, 128), power_of_two))[0]

    assert roundtrip(0.0, -0.0).tolist() == [0.0, 0.0]
    assert roundtrip(448.0, -448.0, 1.0).tolist() == [448.0, -448.0, 1.0]
    tiny = torch.tensor([1e-30, -5e-31])
    torch.testing.assert_close(roundtrip(*tiny.tolist()), tiny, rtol=1 / 16, atol=0)
    assert roundtrip(1e-42, 0.0).tolist() == [0.0, 0.0]  # below half of 2^-126 times the smallest E4M3 number
    largest = 3e38
    assert roundtrip(largest, -largest).isfinite().all()
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert roundtrip(1.0, bad).isnan().all()


def test_a_power_of_two_scale_is_kept_if_the_quotient_is_exactly_one():
    _, scales = quantize(torch.full((1, 4), E4M3_MAX * 0.25), (1, 128), power_of_two=True)
    assert scales.item() == 0.25


def test_a_power_of_two_scale_grows_where_the_mantissa_exceeds_that_of_448():
    """All exponents, and all mantissas near 1.75. The scale itself is a power of two, computed without a division."""
    mantissas = torch.cat((torch.arange(0x5FFFF8, 0x600009), torch.tensor([0, 1, 0x400000, 0x7FFFFF])))
    bits = (torch.arange(0xFF)[:, None] << 23) | mantissas
    x = bits.int().view(torch.float32).view(-1, 1)
    expected = quantize_reference(x, (1, 128), True)
    for found, one in zip(quantize_triton(x, (1, 128), True), expected, strict=True):
        same_bits(found, one)
    scaled = x.double() / expected[1].double()
    assert scaled.max() <= E4M3_MAX
    assert (scaled[expected[1] > 2.0**-126] > E4M3_MAX / 2).all()


def test_scales_that_do_not_fit_are_named():
    fp8, scales = quantize(torch.zeros(3, 200), (1, 128))
    with pytest.raises(ValueError, match=r"scales have shape \(3, 2\), blocks of \(128, 128\) need \(1, 2\)"):
        check_scales(fp8, scales, (128, 128))


@given(
    block=st.sampled_from(BLOCKS),
    rows=st.sampled_from([0, 1, 31, 127, 131]),
    columns=st.sampled_from([1, 7, 128, 257]),
    stack=st.sampled_from([(), (2,)]),
    exponent=st.sampled_from([-140, -100, -3, 0, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    power_of_two=st.booleans(),
    special=st.sampled_from([0.0, float("nan"), float("inf"), -float("inf"), 448.0, 1e-30, 1e-42]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(40))
def test_triton_gives_the_references_bits(block, rows, columns, stack, exponent, dtype, power_of_two, special, seed):
    x = draw((*stack, rows, columns), exponent, dtype, seed)
    if rows:
        x[..., 0, 0] = special
    for found, expected in zip(
        quantize_triton(x, block, power_of_two), quantize_reference(x, block, power_of_two), strict=True
    ):
        same_bits(found, expected)


@given(
    rows=st.sampled_from([0, 1, 131, 256]),
    columns=st.sampled_from([1, 7, 257]),
    exponent=st.sampled_from([-140, 0, 100]),
    power_of_two=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_both_directions_in_one_pass(rows, columns, exponent, power_of_two, seed):
    x = draw((rows, columns), exponent, seed=seed)
    rowwise, transposed = quantize_both_reference(x, power_of_two)
    assert transposed[0].is_contiguous()
    same_bits(transposed[0].t().contiguous(), quantize_reference(x, (128, 1), power_of_two)[0])
    for found, expected in zip(quantize_both_triton(x, power_of_two), (rowwise, transposed), strict=True):
        same_bits(found[0], expected[0])
        same_bits(found[1], expected[1])


@settings(max_examples=examples(60))
@given(
    block=st.sampled_from(BLOCKS),
    rows=st.integers(0, 260),
    columns=st.integers(0, 300),
    stack=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_triton_dequantizes_to_the_references_numbers(block, rows, columns, stack, dtype, seed):
    fp8, scales = quantize_reference(draw((*stack, rows, columns), 4, seed=seed), block, True)
    same_bits(dequantize_triton(fp8, scales, block, dtype), dequantize_reference(fp8, scales, block, dtype))


def test_rows_of_a_message_are_dequantized_where_they_are():
    rows = draw((5, 200), seed=3)
    packed = torch.cat((pack_rows_reference(rows), torch.full((5, 7), 255, dtype=torch.uint8)), dim=1)
    fp8, scales = quantize_reference(rows, power_of_two=True)
    found = dequantize_triton(packed[:, :200].view(torch.float8_e4m3fn), scales, dtype=torch.bfloat16)
    same_bits(found, dequantize_reference(fp8, scales, dtype=torch.bfloat16))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"block = \(64, 64\), expected one of \(1, 128\), "):
        quantize_triton(torch.zeros(4, 4), (64, 64))
    with pytest.raises(ValueError, match=r"x_XMK has strides \(1, 4\), expected a contiguous tensor"):
        quantize_triton(torch.zeros(4, 4).t()[:3])
    with pytest.raises(ValueError, match=r"x_MK has dtype torch\.int32, expected torch\.float32 or"):
        quantize_both_triton(torch.zeros(4, 4, dtype=torch.int32))
