import pytest
import torch

from moray.kernels.wide_linear import wide_linear
from tests.kernels.compare import draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_are_those_of_a_widened_input(dtype):
    x, weight, gradient = draw((40, 24), seed=1).to(dtype), draw((6, 24), seed=2), draw((40, 6), seed=3)
    found = []
    for linear in (wide_linear, lambda x, weight: torch.nn.functional.linear(x.to(weight.dtype), weight)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        out = linear(*leaves)
        out.backward(gradient)
        found.append((out, *(leaf.grad for leaf in leaves)))
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_gradients_are_right():
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (3, 4))]
    assert torch.autograd.gradcheck(wide_linear, leaves)
