"""The FP8 linear layer against float64 products of the same quantized numbers, in both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.fp8_linear import fp8_linear, fp8_linears, fp8_weight
from moray.kernels.quantize import COLUMN_TILES, ROW_TILES, WEIGHT_BLOCKS, dequantize, quantize
from moray.kernels.util.deferred import DeferredGradients
from tests.examples import examples
from tests.kernels.compare import draw


def _seen(x, tiles):
    """The numbers behind the FP8 form of x, in float64."""
    return dequantize(*quantize(x, tiles, power_of_two=True), tiles).double()


def _close(found, expected):
    """FP32 products: an error of some 2^-24 per addend, relative to the largest sum."""
    bound = 1e-5 * max(expected.abs().max().item(), 1e-30) if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=bound)


@given(
    rows=st.sampled_from([0, 1, 7, 128, 131]),
    inputs=st.sampled_from([1, 3, 128, 130]),
    outputs=st.sampled_from([1, 5, 128, 257]),
    exponent=st.sampled_from([-20, 0, 15]),
    shared=st.booleans(),
    backend=st.sampled_from(["reference", "triton"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(25))
def test_all_three_gemms_multiply_the_quantized_numbers(rows, inputs, outputs, exponent, shared, backend, seed):
    x = draw((rows, inputs), exponent, seed=seed).requires_grad_()
    weight = draw((outputs, inputs), seed=seed + 1).requires_grad_()
    dy = draw((rows, outputs), seed=seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORAY_KERNELS", backend)
        y = fp8_linear(x, weight, fp8_weight(weight), shared)
        y.backward(dy)
    seen_w = _seen(weight.detach(), WEIGHT_BLOCKS)
    _close(y.detach(), _seen(x.detach(), ROW_TILES) @ seen_w.t())
    _close(x.grad, _seen(dy, ROW_TILES) @ seen_w)
    assert weight.grad.dtype == torch.float32
    _close(weight.grad, _seen(dy, COLUMN_TILES).t() @ _seen(x.detach(), COLUMN_TILES))


def test_transposing_tiles_rounds_no_mantissa_again():
    """With scales that are powers of two, a number that is not lost below the new tile's smallest stays what it was."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator) * torch.exp(torch.randn(256, 1, generator=generator))
    once = _seen(x, ROW_TILES)
    transposed, scales = quantize(once.float(), COLUMN_TILES, power_of_two=True)
    twice = dequantize(transposed, scales, COLUMN_TILES).double()
    normal = once.abs() >= scales.double().repeat_interleave(128, 0)[:256] * 2.0**-6
    assert normal.float().mean() > 0.9
    assert torch.equal(once[normal], twice[normal])
    arbitrary, scales = quantize(once.float(), COLUMN_TILES)
    assert not torch.equal(once[normal], dequantize(arbitrary, scales, COLUMN_TILES).double()[normal])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_three_bits_of_mantissa(dtype):
    x = draw((64, 512), dtype=torch.float64)
    weight = draw((128, 512), dtype=torch.float64, seed=1)
    y = fp8_linear(x.to(dtype), weight.float(), fp8_weight(weight.float()))
    assert y.dtype == dtype
    exact = x @ weight.t()
    # Each factor is off by at most 2^-4, 2^-4 / sqrt(3) / sqrt(2) or so on average; errors of addends are independent.
    assert 0.01 < (y.double() - exact).norm() / exact.norm() < 0.05


def test_only_eight_bits_of_an_input_are_kept_for_the_backward():
    x, weight = draw((256, 512), dtype=torch.bfloat16).requires_grad_(), draw((128, 512)).requires_grad_()
    y = fp8_linear(x, weight, fp8_weight(weight))
    fp8, scales = y.grad_fn.next_functions[0][0].saved_tensors
    assert (fp8.dtype, fp8.shape, scales.shape) == (torch.float8_e4m3fn, (512, 256), (512, 2))
    shared = fp8_linear(x, weight, fp8_weight(weight), shared_input=True)
    (kept,) = shared.grad_fn.next_functions[0][0].saved_tensors
    assert kept.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("deferring", [False, True])
def test_layers_of_one_input_share_its_quantization_and_change_no_bit(deferring):
    x = draw((200, 256), dtype=torch.bfloat16)
    weights = [draw((128, 256), seed=seed) for seed in (1, 2)]
    gradients = [draw((200, 128), dtype=torch.bfloat16, seed=seed) for seed in (3, 4)]
    found = []
    for together in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
        deferred = DeferredGradients() if deferring else None
        quantized = [fp8_weight(weight) for weight in weights]
        if together:
            outs = fp8_linears(leaves[0], leaves[1:], quantized, deferred=deferred)
            assert len(outs[0].grad_fn.next_functions[0][0].saved_tensors) == 2  # one FP8 copy, and its scales
        else:
            each = zip(leaves[1:], quantized, strict=True)
            outs = [fp8_linear(leaves[0], leaf, form, deferred=deferred) for leaf, form in each]
        torch.autograd.backward(outs, gradients)
        if deferred is not None:
            deferred.finish()
        found.append((*outs, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
