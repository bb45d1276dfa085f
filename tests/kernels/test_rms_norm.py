import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels import rms_norm as module
from moray.kernels.rms_norm import rms_norm, rms_norm_reference, rms_norm_triton
from tests.examples import examples
from tests.kernels.compare import draw, same_bits

EPS = 1e-6


def _specimen(rows, width, backward):
    def call():
        x = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        y = rms_norm_triton(x, torch.empty(width, dtype=torch.bfloat16, requires_grad=True), EPS)
        if backward:
            y.backward(y.detach())

    return call


SPECIMENS = {
    "rms norm": _specimen(16, 7168, backward=False),
    "rms norm backward": _specimen(16, 7168, backward=True),
    "rms norm of latents": _specimen(16, 512, backward=True),
    "rms norm of wide rows": _specimen(16, 18432, backward=True),
}


def test_unit_weight_gives_rows_of_root_mean_square_one():
    x_XD = torch.randn(3, 5, 64, dtype=torch.float64) * 7
    y_XD = rms_norm(x_XD, torch.ones(64, dtype=torch.float64), 1e-12)
    torch.testing.assert_close(y_XD.square().mean(-1), torch.ones(3, 5, dtype=torch.float64), rtol=1e-10, atol=0)


def test_equals_torch_with_gradients_in_float64():
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    ours, theirs = rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours.cos().sum(), (x, weight)),
        torch.autograd.grad(theirs.cos().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_rows_keep_their_dtype_and_use_float32_statistics():
    x = torch.randn(4, 512).bfloat16()
    weight = torch.randn(512).bfloat16()
    y = rms_norm(x, weight, 1e-6)
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    assert y.dtype == torch.bfloat16
    # Two roundings to 8 significant bits: at most 2^-8 relative.
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=0)


def _gradients(implementation, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = implementation(x, weight, EPS)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, weight.grad


def _hold(implementation, x, weight, dy):
    """The form's results against FP64's, with u half a unit in the last place of the rows' dtype."""
    y, dx, dweight = _gradients(implementation, x, weight, dy)
    exact_y, exact_dx, _ = _gradients(rms_norm_reference, x.double(), weight.double(), dy.double())
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.promote_types(x.dtype, weight.dtype), x.dtype, weight.dtype)
    u = torch.finfo(x.dtype).eps / 2
    smallest = torch.finfo(y.dtype).smallest_normal
    # The row and the product are rounded once each; sums in FP32 of up to 8,200 numbers.
    torch.testing.assert_close(y.double(), exact_y, rtol=2.1 * u + 2e-6, atol=smallest)
    scaled = (dy.double() * weight.double()).abs().amax(-1, keepdim=True).clamp(min=1e-300)
    inverse = 1 / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    normal = (x.double() * inverse).abs().amax(-1, keepdim=True).clamp(min=1)
    assert ((dx.double() - exact_dx).abs() <= 1.1 * u * exact_dx.abs() + 5e-6 * inverse * scaled * normal**2).all()
    # The normalised rows are rounded before dy multiplies them.
    terms = dy.double() * (x.double() * inverse)
    bound = (u + 2e-6) * terms.abs().sum(0) + u * terms.sum(0).abs() * 1.1 + smallest
    assert ((dweight.double() - terms.sum(0)).abs() <= bound).all()


@given(
    rows=st.sampled_from([1, 2, 17, 40]),
    width=st.sampled_from([1, 2, 7, 48, 131, 1000]),
    exponent=st.sampled_from([-140, -100, -12, 0, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_triton_and_the_reference_are_near_fp64(rows, width, exponent, dtype, seed):
    x, dy = draw((rows, width), exponent, dtype, seed), draw((rows, width), 0, dtype, seed + 1)
    weight = draw((width,), 0, dtype, seed + 2)
    _hold(rms_norm_triton, x, weight, dy)
    expected = rms_norm_reference(x, weight, EPS)
    # The order of FP32's sums may move the normalised row, and then the product, to the next BF16 number.
    rtol = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(rms_norm_triton(x, weight, EPS), expected, rtol=rtol, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("width", [33, 8200])
def test_ctas_with_several_tiles_and_rows_larger_than_a_tile(width, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    monkeypatch.setattr(module, "_TILE", 2048)
    x, dy = draw((9 if width > 8192 else 300, width)), draw((9 if width > 8192 else 300, width), seed=1)
    _hold(rms_norm_triton, x, draw((width,), seed=2), dy)


def test_slices_of_wider_rows_and_other_dtypes_of_weights():
    wide, weight, dy = draw((2, 5, 24), dtype=torch.bfloat16), draw((16,)), draw((2, 5, 16))
    part = wide[..., 8:]
    for x in (part, part[:, ::2], part.transpose(0, 1)):
        same_bits(rms_norm_triton(x, weight, EPS), rms_norm_reference(x, weight, EPS))
    y, dx, dweight = _gradients(rms_norm_triton, part, weight, dy)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert rms_norm_triton(part, weight, EPS).is_contiguous()
    summed = part.detach().requires_grad_()
    rms_norm_triton(summed, weight, EPS).sum().backward()  # its gradient has strides of 0
    torch.testing.assert_close(
        summed.grad, _gradients(rms_norm_reference, part, weight, torch.ones(2, 5, 16))[1], rtol=2**-7, atol=2**-8
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 7)])
def test_no_rows_and_no_columns(shape):
    y, dx, dweight = _gradients(rms_norm_triton, torch.zeros(shape), torch.ones(shape[-1]), torch.zeros(shape))
    assert y.shape == dx.shape == shape
    assert not dweight.any()


def test_extreme_rows():
    x = torch.tensor([[0.0, 0.0, 0.0], [1e30, -1e30, 0.0], [float("nan"), 1.0, 2.0], [float("inf"), 1.0, 2.0]])
    weight = torch.tensor([1.0, 2.0, 3.0])
    found = rms_norm_triton(x, weight, EPS)
    same_bits(found, rms_norm_reference(x, weight, EPS))
    assert not found[:2].any()  # the squares' sum is infinite in the second row
    assert found[2].isnan().all()


def test_wrong_arguments_are_named(monkeypatch):
    x, weight = torch.zeros(4, 6), torch.zeros(6)
    with pytest.raises(ValueError, match=r"weight_D has shape \(5,\), expected \(6\)"):
        rms_norm_triton(x, weight[:5].clone(), EPS)
    with pytest.raises(ValueError, match=r"x_XD has strides \(1, 4\), expected \(any, 1\)"):
        rms_norm_triton(torch.zeros(6, 4).t(), weight, EPS)
    with pytest.raises(ValueError, match=r"x_XD has dtype torch.float64, expected torch.float32 or"):
        rms_norm_triton(x.double(), weight, EPS)
    with pytest.raises(ValueError, match=r"x_XD has dtype torch.int32"):
        rms_norm_triton(x.int(), weight, EPS)
    with pytest.raises(ValueError, match="weight_D is on device meta, expected cpu"):
        rms_norm_triton(x, weight.to("meta"), EPS)
    with pytest.raises(ValueError, match="expected at most 32768 elements in the last axis"):
        rms_norm_triton(torch.zeros(1, 32769), torch.zeros(32769), EPS)
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    transposed = draw((6, 4)).t()
    same_bits(rms_norm(transposed, weight, EPS), rms_norm_reference(transposed, weight, EPS))
    assert rms_norm(x.double(), weight.double(), EPS).dtype == torch.float64


def test_the_references_gradient_is_the_formulas():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x.transpose(0, 1)[:0], w, EPS), (x, weight))
