import pytest
import torch

from moray.kernels.rope import rope, rope_table


def _rotate(x_BTHP, positions_BT):
    return rope(x_BTHP, *rope_table(positions_BT, x_BTHP.shape[-1], 10000.0, x_BTHP.dtype))


def test_is_a_complex_rotation_of_interleaved_pairs():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 100, (2, 5))
    rates = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turns = torch.polar(torch.ones(2, 5, 4, dtype=torch.float64), positions[..., None] * rates)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns[:, :, None]
    torch.testing.assert_close(_rotate(x, positions), torch.view_as_real(pairs).flatten(-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_dot_products_depend_on_the_distance_only(shift):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    at = torch.tensor([[5]])
    near = (_rotate(q, at + 3) * _rotate(k, at)).sum()
    far = (_rotate(q, at + 3 + shift) * _rotate(k, at + shift)).sum()
    torch.testing.assert_close(near, far, rtol=1e-11, atol=1e-11)


def test_position_zero_changes_nothing_and_dtype_stays():
    x = torch.randn(1, 1, 2, 4).bfloat16()
    y = _rotate(x, torch.zeros(1, 1, dtype=torch.int64))
    assert y.dtype == torch.bfloat16
    assert torch.equal(x, y)
