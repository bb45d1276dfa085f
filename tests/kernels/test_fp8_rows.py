import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.fp8_rows import Fp8Rows, transpose_fp8_reference, transpose_fp8_triton
from moray.kernels.quantize import quantize, quantize_both
from tests.examples import examples
from tests.kernels.compare import draw, same_bits

SPECIMENS = {
    "transpose fp8": lambda: transpose_fp8_triton(torch.zeros(256, 512).to(torch.float8_e4m3fn), torch.zeros(256, 4)),
}


def _rows(*shape, dtype=torch.bfloat16, seed=0):
    return Fp8Rows(*quantize(draw(shape, seed=seed), power_of_two=True), dtype)


@given(
    rows=st.sampled_from([0, 1, 127, 128, 131]),
    columns=st.sampled_from([1, 33, 128, 129, 300]),
    more=st.sampled_from([0, 5]),
    extreme=st.sampled_from([None, 0.0, 448.0, 1e-30, 1e-42, float("inf"), float("nan")]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(40))
def test_a_transpose_is_that_of_the_dequantized_rows(rows, columns, more, extreme, seed):
    x = draw((rows, columns), seed=seed) * torch.logspace(-6, 6, columns)
    if extreme is not None:
        x[::2, ::3] = extreme
    fp8, scales = quantize(x, power_of_two=True)
    message = torch.cat((fp8.view(torch.uint8), torch.zeros(rows, more, dtype=torch.uint8)), dim=1)
    apart = message.view(torch.float8_e4m3fn)[:, :columns]
    expected = quantize_both(Fp8Rows(fp8, scales, torch.float32).dequantized(), power_of_two=True)[1]
    for form in (transpose_fp8_reference, transpose_fp8_triton):
        for found, one in zip(form(apart, scales), expected, strict=True):
            same_bits(found, one)


def test_other_operations_see_the_numbers():
    rows = _rows(5, 200)
    plain = rows.dequantized()
    assert (rows.shape, rows.dtype) == ((5, 200), torch.bfloat16)
    assert type(rows * 2) is torch.Tensor
    assert torch.equal(rows * 2, plain * 2)
    assert torch.equal(torch.cat([rows, rows]), plain.repeat(2, 1))
    assert torch.equal(torch.add(rows, other=rows), plain * 2)


def test_autograd_passes_them_on_as_they_are():
    """A gradient in FP8 reaches a backward as such, and the gradient of rows in FP8 is not."""
    sent = []

    class Experts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows):
            sent.append(rows)
            return rows.dequantized()

        @staticmethod
        def backward(ctx, gradient):
            sent.append(gradient)
            return gradient.dequantized()

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return _rows(*x.shape)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return _rows(*gradient.shape, seed=1)

    x = torch.zeros(3, 200, dtype=torch.bfloat16, requires_grad=True)
    Combine.apply(Experts.apply(Exchange.apply(x))).sum().backward()
    assert [type(one) for one in sent] == [Fp8Rows, Fp8Rows]
    assert type(x.grad) is torch.Tensor
    assert torch.equal(x.grad, _rows(3, 200, seed=1).dequantized())


def test_scales_of_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"scales have shape \(5, 1\), blocks of \(1, 128\) need \(5, 2\)"):
        transpose_fp8_triton(torch.zeros(5, 200).to(torch.float8_e4m3fn), torch.zeros(5, 1))
