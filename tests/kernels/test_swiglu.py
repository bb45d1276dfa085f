"""SwiGLU with its quantisation: Triton against the reference, the reference against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.quantize import dequantize, quantize
from moray.kernels.swiglu import (
    swiglu_backward_reference,
    swiglu_backward_triton,
    swiglu_quantize_reference,
    swiglu_quantize_triton,
)
from tests.examples import examples
from tests.kernels.compare import draw

ROWS, INNER = st.sampled_from([0, 128, 256]), st.sampled_from([0, 128, 384])
BF16, FP8 = torch.zeros(256, 512, dtype=torch.bfloat16), torch.zeros(256, 512, dtype=torch.float8_e4m3fn)
SCALES, WEIGHTS = torch.zeros(256, 4), torch.zeros(256)
D_INNER = torch.zeros(256, 256, dtype=torch.bfloat16)
SPECIMENS = {
    "swiglu": lambda: swiglu_quantize_triton(BF16),
    "swiglu with the router's weight": lambda: swiglu_quantize_triton(BF16, WEIGHTS),
    "swiglu backward": lambda: swiglu_backward_triton((FP8, SCALES), D_INNER),
    "swiglu backward with the router's weight": lambda: swiglu_backward_triton((FP8, SCALES), D_INNER, WEIGHTS),
}


def _same_but_for_edges(found, expected):
    """FP8 numbers and scales: where the sigmoid's last bit decides, a number may fall to its neighbour, and a tile's
    largest may lift its scale. Both are rare."""
    assert found[0].shape == expected[0].shape
    assert found[1].shape == expected[1].shape
    if not expected[0].numel():
        return
    assert (found[1] == expected[1]).float().mean() > 0.99
    there, back = dequantize(*found), dequantize(*expected)
    assert (there == back).float().mean() > 0.99
    torch.testing.assert_close(there, back, rtol=1 / 7, atol=back.abs().max().item() * 2**-15)


@given(
    rows=ROWS,
    inner=INNER,
    exponent=st.sampled_from([-20, 0, 4]),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_forward(rows, inner, exponent, weighted, dtype, seed):
    gate_up = draw((rows, 2 * inner), exponent, dtype, seed)
    weights = draw((rows,), seed=seed + 1).abs() if weighted else None
    expected = swiglu_quantize_reference(gate_up, weights)
    for found, wanted in zip(swiglu_quantize_triton(gate_up, weights), expected, strict=True):
        _same_but_for_edges(found, wanted)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = F.silu(gate) * up * (1 if weights is None else weights.double().unsqueeze(1))
    # Half a step of three bits of mantissa, or half of the smallest step of a tile.
    largest = exact.abs().amax().item() if exact.numel() else 0
    torch.testing.assert_close(dequantize(*expected[0]).double(), exact, rtol=2**-4 * 1.001, atol=largest * 2**-16)


@given(
    rows=ROWS,
    inner=INNER,
    exponent=st.sampled_from([-20, 0, 4]),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_backward(rows, inner, exponent, weighted, dtype, seed):
    held = quantize(draw((rows, 2 * inner), 0, dtype, seed), power_of_two=True)
    d_inner = draw((rows, inner), exponent, dtype, seed + 1)
    weights = draw((rows,), seed=seed + 2).abs() if weighted else None
    expected = swiglu_backward_reference(held, d_inner, weights)
    found = swiglu_backward_triton(held, d_inner, weights)
    for name in ("rowwise", "transposed", "inner"):
        _same_but_for_edges(getattr(found, name), getattr(expected, name))
    both = dequantize(*held).double().requires_grad_()
    factor = torch.ones(rows, dtype=torch.float64) if weights is None else weights.double()
    factor.requires_grad_()
    gate, up = both.chunk(2, dim=1)
    product = F.silu(gate) * up * factor.unsqueeze(1)
    product.backward(d_inner.double())
    for quantized, exact in (
        (expected.rowwise, both.grad),
        (expected.transposed, both.grad.t()),
        (expected.inner, product.detach().t()),
    ):
        largest = exact.abs().amax().item() if exact.numel() else 0
        torch.testing.assert_close(dequantize(*quantized).double(), exact, rtol=2**-4 * 1.001, atol=largest * 2**-16)
    if weighted:
        size = factor.grad.abs().max().item() if rows else 0
        for gradient in (found.weights_R, expected.weights_R):
            torch.testing.assert_close(gradient.double(), factor.grad, rtol=1e-5, atol=1e-5 * size)
    else:
        assert found.weights_R is None
        assert expected.weights_R is None


@pytest.mark.parametrize("implementation", [swiglu_quantize_triton, swiglu_quantize_reference])
def test_non_finite_numbers_mark_their_tile(implementation):
    gate_up = draw((128, 512))
    gate_up[3, 5] = float("inf")
    product, held = implementation(gate_up)
    wide = dequantize(*product)
    assert wide[3, :128].isnan().all()
    assert wide[3, 128:].isfinite().all()
    assert dequantize(*held)[4:].isfinite().all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"gate_up_RH has 300 columns, expected a multiple of 256: gate, then up"):
        swiglu_quantize_triton(torch.zeros(128, 300))
    with pytest.raises(ValueError, match=r"gate_up_RH has 100 rows, expected a multiple of 128"):
        swiglu_quantize_triton(torch.zeros(100, 256))
    with pytest.raises(ValueError, match=r"weights_R has shape \(100,\), expected \(128\)"):
        swiglu_quantize_triton(torch.zeros(128, 256), torch.zeros(100))
    held = (torch.zeros(128, 256, dtype=torch.float8_e4m3fn), torch.zeros(128, 2))
    with pytest.raises(ValueError, match=r"d_inner_RF has shape \(128, 256\), expected \(128, 128\)"):
        swiglu_backward_triton(held, torch.zeros(128, 256))
