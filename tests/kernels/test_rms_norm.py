import torch

from moray.kernels.rms_norm import rms_norm


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
