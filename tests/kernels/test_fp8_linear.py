"""The three FP8 products against float64 products of the numbers that they are meant to multiply."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.fp8_linear import (
    COLUMN_TILES,
    ROW_TILES,
    WEIGHT_BLOCKS,
    e5m6_reference,
    fp8_linear,
    fp8_swiglu_down,
    fp8_weight,
)
from moray.kernels.quantize import dequantize, quantize


def _seen(x, tiles, power_of_two=True):
    """The numbers behind the FP8 form of x, in float64."""
    return dequantize(*quantize(x, tiles, power_of_two), tiles).double()


def _close(found, expected):
    """FP32 products: an error of some 2^-24 per addend, relative to the largest sum."""
    bound = 1e-5 * max(expected.abs().max().item(), 1e-30) if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=bound)


@given(
    rows=st.sampled_from([0, 1, 7, 128, 131]), inputs=st.sampled_from([1, 3, 128, 130]),
    outputs=st.sampled_from([1, 5, 128, 257]), exponent=st.sampled_from([-20, 0, 15]), e5m6=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_all_three_products_multiply_what_they_should(rows, inputs, outputs, exponent, e5m6, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, inputs, generator=generator) * 2.0**exponent).requires_grad_()
    weight = torch.randn(outputs, inputs, generator=generator).requires_grad_()
    dy = torch.randn(rows, outputs, generator=generator)
    y = fp8_linear(x, weight, fp8_weight(weight), e5m6)
    y.backward(dy)
    held = e5m6_reference(x.detach()) if e5m6 else x.detach()
    seen_x, seen_w = _seen(held, ROW_TILES), _seen(weight.detach(), WEIGHT_BLOCKS, power_of_two=False)
    _close(y.detach(), seen_x @ seen_w.t())
    _close(x.grad, _seen(dy, ROW_TILES) @ seen_w)
    turned = _seen(held if e5m6 else seen_x.float(), COLUMN_TILES)
    _close(weight.grad, _seen(dy, COLUMN_TILES).t() @ turned)


def test_turning_tiles_rounds_no_mantissa_again():
    """With scales that are powers of two, a number that is not lost below the new tile's smallest stays what it was."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator) * torch.exp(torch.randn(256, 1, generator=generator))
    once = _seen(x, ROW_TILES)
    turned, scales = quantize(once.float(), COLUMN_TILES, power_of_two=True)
    twice = dequantize(turned, scales, COLUMN_TILES).double()
    normal = once.abs() >= scales.double().repeat_interleave(128, 0)[:256] * 2.0**-6
    assert normal.float().mean() > 0.9
    assert torch.equal(once[normal], twice[normal])
    arbitrary, scales = quantize(once.float(), COLUMN_TILES)
    assert not torch.equal(once[normal], dequantize(arbitrary, scales, COLUMN_TILES).double()[normal])


def test_e5m6_is_the_nearest_with_six_bits():
    x = torch.randn(1000) * 10
    found = e5m6_reference(x).double()
    mantissa, exponent = torch.frexp(x.double())
    assert torch.equal(found, torch.ldexp((mantissa * 128).round() / 128, exponent))
    assert e5m6_reference(torch.tensor([0.0, 1.0 + 2**-7, 1.0 + 3 * 2**-7])).tolist() == [0.0, 1.0, 1.0 + 2**-5]


def test_swiglu_down_is_its_parts():
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(40, 200, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.randn(96, 200, generator=generator).requires_grad_()
    dy = torch.randn(40, 96, generator=generator)
    y = fp8_swiglu_down(gate, up, weight, fp8_weight(weight))
    y.backward(dy)
    seen_w = _seen(weight.detach(), WEIGHT_BLOCKS, power_of_two=False)
    _close(y.detach(), _seen((F.silu(gate) * up).detach(), ROW_TILES) @ seen_w.t())
    g, u = (_seen(x.detach(), ROW_TILES).requires_grad_() for x in (gate, up))
    inner = F.silu(g) * u
    inner.backward(_seen(dy, ROW_TILES) @ seen_w)
    _close(gate.grad, g.grad)
    _close(up.grad, u.grad)
    # Computed again in FP32, so a value on the edge between two E4M3 numbers may fall to the other side.
    expected = _seen(dy, COLUMN_TILES).t() @ _seen(inner.detach().float(), COLUMN_TILES)
    assert ((weight.grad.double() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_three_bits_of_mantissa(dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 512, generator=generator, dtype=torch.float64)
    weight = torch.randn(128, 512, generator=generator, dtype=torch.float64)
    y = fp8_linear(x.to(dtype), weight.float(), fp8_weight(weight.float()))
    assert y.dtype == dtype
    exact = x @ weight.t()
    # Each factor is off by at most 2^-4, 2^-4 / sqrt(3) / sqrt(2) or so on average; errors of addends are independent.
    assert 0.01 < (y.double() - exact).norm() / exact.norm() < 0.05
