"""The three FP8 products: Triton against the reference, the reference against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.fp8_gemm import (
    fp8_gemm,
    fp8_gemm_grouped_reference,
    fp8_gemm_grouped_triton,
    fp8_gemm_k_grouped_reference,
    fp8_gemm_k_grouped_triton,
    fp8_gemm_reference,
    fp8_gemm_triton,
)
from moray.kernels.quantize import BLOCK, ROW_TILES, WEIGHT_BLOCKS, dequantize, quantize
from moray.kernels.tuning import DEFAULT, Tiles, nearest_shape
from tests.examples import examples
from tests.kernels.compare import draw

SMALL = Tiles(rows=64, columns=32)
SIZES = st.sampled_from([0, 1, 7, 16, 64, 97, 128, 131])
SUMMED = st.sampled_from([0, 1, 16, 100, 128, 257])
EXPONENTS = st.sampled_from([-60, -3, 0, 40])


def _real(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


def _specimen_gemm(b_block):
    a, a_scales = _real(torch.float8_e4m3fn, 256, 512), _real(torch.float32, 256, 4)
    b, b_scales = _real(torch.float8_e4m3fn, 512, 512), _real(torch.float32, 512 // b_block[0], 4)
    return lambda: fp8_gemm_triton(a, a_scales, b, b_scales, b_block=b_block)


def _specimen_grouped():
    a, a_scales = _real(torch.float8_e4m3fn, 512, 512), _real(torch.float32, 512, 4)
    b, b_scales = _real(torch.float8_e4m3fn, 8, 256, 512), _real(torch.float32, 8, 2, 4)
    return lambda: fp8_gemm_grouped_triton(a, a_scales, b, b_scales, torch.zeros(9, dtype=torch.int32))


def _specimen_k_grouped():
    a, a_scales = _real(torch.float8_e4m3fn, 256, 1024), _real(torch.float32, 256, 8)
    return lambda: fp8_gemm_k_grouped_triton(a, a_scales, a, a_scales, torch.zeros(9, dtype=torch.int32))


SPECIMENS = {
    "fp8 product by weight blocks": _specimen_gemm(WEIGHT_BLOCKS),
    "fp8 product by tiles": _specimen_gemm(ROW_TILES),
    "fp8 product grouped over rows": _specimen_grouped(),
    "fp8 product grouped over the summed axis": _specimen_k_grouped(),
}


def _close(found, expected, a, b):
    """Partial sums of 128 products in FP32, then one FP32 addition for each: an error of some 2^-24 per addend of the
    largest sum of sizes (the products themselves may cancel); products of two E4M3 numbers are exact.

    a [m, k], b [n, k]: float64, the operands of everything that was found.
    """
    sizes = a.abs() @ b.abs().t()
    largest = sizes.max().item() if sizes.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-5 * largest)


@given(
    m=SIZES,
    n=SIZES,
    k=SUMMED,
    exponent=EXPONENTS,
    block=st.sampled_from([WEIGHT_BLOCKS, ROW_TILES]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(40))
def test_the_product(m, n, k, exponent, block, seed):
    a, a_scales = quantize(draw((m, k), exponent, seed=seed))
    b, b_scales = quantize(draw((n, k), seed=seed + 1), block)
    wide = dequantize(a, a_scales).double(), dequantize(b, b_scales, block).double()
    exact = wide[0] @ wide[1].t()
    options = {"b_block": block, "dtype": torch.float32}
    _close(fp8_gemm_reference(a, a_scales, b, b_scales, **options), exact, *wide)
    found = fp8_gemm_triton(a, a_scales, b, b_scales, shape=SMALL, **options)
    assert found.dtype == torch.float32
    _close(found, exact, *wide)


def _offsets(blocks):
    return torch.tensor([0, *blocks], dtype=torch.int32).cumsum(0, dtype=torch.int32) * BLOCK


GROUPS = st.sampled_from([(1,), (0,), (0, 0), (0, 1, 0), (3, 0, 0), (1, 2, 1), (0, 0, 1, 0, 2), (2, 1, 0, 0, 0, 0, 0)])


@given(
    blocks=GROUPS,
    n=st.sampled_from([1, 33, 130]),
    k=SUMMED,
    spare=st.sampled_from([0, 128, 130]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(25))
def test_groups_of_rows(blocks, n, k, spare, seed):
    offsets = _offsets(blocks)
    end = int(offsets[-1])
    a, a_scales = quantize(draw((end + spare, k), seed=seed))
    b, b_scales = quantize(draw((len(blocks), n, k), seed=seed + 1), WEIGHT_BLOCKS)
    expected = fp8_gemm_grouped_reference(a, a_scales, b, b_scales, offsets, dtype=torch.float32)
    assert not expected[end:].any()
    found = fp8_gemm_grouped_triton(a, a_scales, b, b_scales, offsets, dtype=torch.float32, shape=SMALL)
    for expert in range(len(blocks)):
        part = slice(int(offsets[expert]), int(offsets[expert + 1]))
        wide = (
            dequantize(a[part], a_scales[part]).double(),
            dequantize(b[expert], b_scales[expert], WEIGHT_BLOCKS).double(),
        )
        _close(found[part], expected[part], *wide)
        _close(found[part], wide[0] @ wide[1].t(), *wide)


@given(blocks=GROUPS, m=st.sampled_from([0, 1, 97]), n=st.sampled_from([1, 33, 130]), seed=st.integers(0, 2**31))
@settings(max_examples=examples(25))
def test_groups_of_the_summed_axis(blocks, m, n, seed):
    offsets = _offsets(blocks)
    rows = int(offsets[-1]) + 128  # the buffer's unused end, full of numbers
    a, a_scales = quantize(draw((m, rows), seed=seed))
    b, b_scales = quantize(draw((n, rows), seed=seed + 1))
    expected = fp8_gemm_k_grouped_reference(a, a_scales, b, b_scales, offsets)
    found = fp8_gemm_k_grouped_triton(a, a_scales, b, b_scales, offsets, shape=SMALL)
    assert found.shape == (len(blocks), m, n)
    for expert, count in enumerate(blocks):
        part = slice(int(offsets[expert]), int(offsets[expert + 1]))
        wide = dequantize(a, a_scales).double()[:, part], dequantize(b, b_scales).double()[:, part]
        _close(found[expert], expected[expert], *wide)
        _close(found[expert], wide[0] @ wide[1].t(), *wide)
        assert count or not found[expert].any()


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_non_finite_numbers_reach_only_their_row(special):
    x = draw((4, 200))
    x[1, 150] = special
    a, a_scales = quantize(x)
    b, b_scales = quantize(draw((5, 200)), WEIGHT_BLOCKS)
    found = fp8_gemm_triton(a, a_scales, b, b_scales)
    assert found.dtype == torch.bfloat16
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()


def test_the_cpu_takes_the_reference():
    a, a_scales = quantize(draw((4, 200)))
    b, b_scales = quantize(draw((5, 200)), WEIGHT_BLOCKS)
    assert torch.equal(fp8_gemm(a, a_scales, b, b_scales), fp8_gemm_reference(a, a_scales, b, b_scales))


def test_wrong_arguments_are_named():
    a, a_scales = quantize(draw((4, 200)))
    b, b_scales = quantize(draw((5, 200)), WEIGHT_BLOCKS)
    offsets = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"b_NK has shape \(5, 199\), expected \(5, 200\)"):
        fp8_gemm_triton(a, a_scales, b[:, 1:], b_scales)
    with pytest.raises(ValueError, match=r"b_NK has dtype torch\.float32, expected torch\.float8_e4m3fn"):
        fp8_gemm_triton(a, a_scales, b.float(), b_scales)
    with pytest.raises(ValueError, match=r"a_MK's scales has shape \(4, 1\), expected \(4, 2\)"):
        fp8_gemm_triton(a, a_scales[:, :1].contiguous(), b, b_scales)
    with pytest.raises(ValueError, match=r"b_block = \(128, 1\), expected \(128, 128\) or \(1, 128\)"):
        fp8_gemm_triton(a, a_scales, b, b_scales, b_block=(128, 1))
    with pytest.raises(ValueError, match=r"dtype = torch\.float64, expected torch\.float32 or torch\.bfloat16"):
        fp8_gemm_triton(a, a_scales, b, b_scales, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"offsets_E1 has shape \(2,\), expected \(3\)"):
        fp8_gemm_grouped_triton(a, a_scales, torch.stack((b, b)), torch.stack((b_scales, b_scales)), offsets)
    with pytest.raises(ValueError, match=r"offsets_E1 has dtype torch\.int64, expected torch\.int32"):
        fp8_gemm_k_grouped_triton(a, a_scales, a, a_scales, offsets.long())


def test_a_device_without_a_table_gets_the_default():
    assert nearest_shape("no such device", "fp8_gemm", 1, 2, 3) == DEFAULT
