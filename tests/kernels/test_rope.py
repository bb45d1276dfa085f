import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.rope import rope, rope_reference, rope_table, rope_triton
from tests.examples import examples
from tests.kernels.compare import draw, same_bits


def _specimen(heads, backward):
    def call():
        wide = torch.empty(1, 64, heads, 192, dtype=torch.bfloat16, requires_grad=True)
        y = rope_triton(wide[..., 128:], torch.empty(1, 64, 32), torch.empty(1, 64, 32))
        if backward:
            y.backward(y.detach())

    return call


SPECIMENS = {
    "rope of queries": _specimen(64, backward=False),
    "rope of queries backward": _specimen(64, backward=True),
    "rope of keys": _specimen(1, backward=True),
}


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


def test_position_zero_changes_nothing_and_dtype_is_kept():
    x = torch.randn(1, 1, 2, 4).bfloat16()
    y = _rotate(x, torch.zeros(1, 1, dtype=torch.int64))
    assert y.dtype == torch.bfloat16
    assert torch.equal(x, y)


def _with_gradient(implementation, x, dy, *tables):
    x = x.detach().requires_grad_()
    y = implementation(x, *tables)
    y.backward(dy)
    return y.detach(), x.grad


@given(
    batch=st.sampled_from([0, 1, 3]),
    tokens=st.sampled_from([0, 1, 7, 65]),
    heads=st.sampled_from([1, 3, 17]),
    size=st.sampled_from([0, 2, 6, 64]),
    offset=st.sampled_from([0, 3]),
    one_table=st.booleans(),
    exponent=st.sampled_from([-145, -100, 0, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(30))
def test_triton_is_the_reference(batch, tokens, heads, size, offset, one_table, exponent, dtype, seed):
    x = draw((batch, tokens, heads, size + offset), exponent, dtype, seed)[..., offset:]
    dy = draw((batch, tokens, size, heads), 0, dtype, seed + 1).transpose(-1, -2)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 4096, (1 if one_table else batch, tokens), generator=generator)
    tables = rope_table(positions, size, 10000.0, dtype)
    found, expected = (
        _with_gradient(implementation, x, dy, *tables) for implementation in (rope_triton, rope_reference)
    )
    exact = _with_gradient(rope_reference, x.double(), dy.double(), *(table.double() for table in tables))
    assert found[0].is_contiguous()
    # Without fused multiply-adds, as here, the operations are the reference's.
    for ours, theirs, best in zip(found, expected, exact, strict=True):
        same_bits(ours, theirs)
        largest = best.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
        u = torch.finfo(dtype).eps / 2
        assert ((ours.double() - best).abs() <= u * best.abs() + 2**-22 * largest + torch.finfo(dtype).tiny).all()


def test_non_finite_numbers_stay_in_their_pair():
    x = torch.ones(1, 1, 1, 6)
    x[..., 1], x[..., 4] = float("nan"), float("inf")
    tables = rope_table(torch.tensor([[3]]), 6, 10000.0, torch.float32)
    found = rope_triton(x, *tables)
    same_bits(found, rope_reference(x, *tables))
    assert found.isfinite().flatten().tolist() == [False, False, True, True, False, False]


def test_wrong_arguments_are_named(monkeypatch):
    x, table = torch.zeros(2, 5, 3, 8), torch.zeros(1, 5, 4)
    with pytest.raises(ValueError, match=r"x_BTHP has shape \(2, 5, 3, 7\), expected an even last axis"):
        rope_triton(x[..., :7], table, table)
    with pytest.raises(ValueError, match=r"x_BTHP has strides .*, expected \(any, any, any, 1\)"):
        rope_triton(x.transpose(2, 3)[:, :, :2], table, table)
    with pytest.raises(ValueError, match=r"x_BTHP has dtype torch.float64"):
        rope_triton(x.double(), table, table)
    with pytest.raises(ValueError, match=r"cos_BTQ has shape \(3, 5, 4\), expected \(2, 5, 4\)"):
        rope_triton(x, table.expand(3, 5, 4).clone(), table)
    with pytest.raises(ValueError, match=r"sin_BTQ has shape \(1, 5, 3\), expected \(1, 5, 4\)"):
        rope_triton(x, table, table[..., :3].clone())
    with pytest.raises(ValueError, match=r"cos_BTQ has dtype torch.bfloat16, expected torch.float32"):
        rope_triton(x, table.bfloat16(), table)
    with pytest.raises(ValueError, match="sin_BTQ is on device meta, expected cpu"):
        rope_triton(x, table, table.to("meta"))
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    strided, tables = draw((2, 5, 8, 3)).transpose(2, 3), rope_table(torch.arange(5)[None], 8, 10000.0, torch.float32)
    same_bits(rope(strided, *tables), rope_reference(strided, *tables))
    assert rope(x.double(), table.double(), table.double()).dtype == torch.float64
