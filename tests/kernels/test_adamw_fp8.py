import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.adamw_fp8 import POWERS, Fp8Moment, adamw_fp8, compress, restore


def _spread(count, decades, seed, signed):
    """Log-uniform magnitudes over so many decades."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** (-decades * torch.rand(count, generator=generator))
    return magnitude * torch.randn(count, generator=generator).sign() if signed else magnitude


@given(
    count=st.sampled_from([1, 5, 127, 128, 129, 1000]), decades=st.sampled_from([0.0, 1.0, 3.0, 6.0, 10.0]),
    scale=st.sampled_from([1e-20, 1e-6, 1.0]), signed=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_error_is_that_of_three_bits_divided_by_the_power(count, decades, scale, signed, seed):
    x = _spread(count, decades, seed, signed) * scale
    moment = compress(x)
    back = restore(moment)
    power = moment.powers_J.repeat_interleave(128)[:count]
    assert ((power >= POWERS[0]) & (power <= POWERS[1])).all()
    # A normal number is off by at most 2^-4 of itself, a subnormal one by half of the smallest.
    stored = (x.abs() / moment.scales_J.repeat_interleave(128)[:count]).pow(power) * 448
    relative = torch.maximum(torch.tensor(2.0**-4), 2.0**-10 / stored)
    up, down = (1 + relative).pow(1 / power) - 1, 1 - (1 - relative).clamp(min=0).pow(1 / power)
    bound = torch.maximum(up, down) * x.abs() * 1.001
    assert ((back - x).abs() <= bound).all()
    assert torch.equal(back.sign(), x.sign())  # nothing non-zero becomes zero


def test_small_second_moments_survive_where_plain_fp8_loses_them():
    x = _spread(12800, 7.0, 0, signed=False)
    plain, expanded = restore(compress(x, expand=False)), restore(compress(x))
    assert (plain == 0).float().mean() > 0.1
    assert not (expanded == 0).any()


def test_a_narrow_block_is_finer_than_plain_fp8():
    x = _spread(12800, 1.0, 0, signed=True)
    plain, expanded = (((restore(compress(x, expand)) - x) / x).square().mean().sqrt() for expand in (False, True))
    assert expanded < plain / 3


def test_extreme_blocks():
    assert not restore(compress(torch.zeros(130))).any()
    one = torch.zeros(128)
    one[3] = -1e-30
    assert torch.equal(restore(compress(one)), one)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(256)
        x[0] = bad
        back = restore(compress(x))
        assert back[:128].isnan().all()
        assert torch.equal(back[128:], torch.ones(128))
    assert len(restore(compress(torch.zeros(0)))) == 0


def test_state_takes_an_eighth_more_than_two_bytes_a_parameter():
    moment = Fp8Moment.zeros(1_000_000)
    assert 4 + 2 * moment.nbytes / 1_000_000 <= 6.2
    assert not restore(moment).any()


def _descend(step_of, steps=300):
    """The way down a badly conditioned quadratic with noisy gradients: curvatures over six decades in every block."""
    generator = torch.Generator().manual_seed(0)
    curvature = 10.0 ** (-6 * torch.rand(1000, generator=generator))
    x = torch.randn(1000, generator=generator)
    way = [x.clone()]
    for step in range(1, steps + 1):
        grad = curvature * (x + 0.1 * torch.randn(1000, generator=generator))
        step_of(x, grad, step)
        way.append(x.clone())
    return torch.stack(way)


NUMBERS = {"rate": 0.01, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-15, "weight_decay": 0.0}


def _ours(expand):
    first, second = Fp8Moment.zeros(1000), Fp8Moment.zeros(1000)
    return lambda x, grad, step: adamw_fp8(x, grad, first, second, step=step, expand=expand, **NUMBERS)


def _theirs():
    parameter = torch.nn.Parameter(torch.empty(1000))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)

    def step_of(x, grad, step):
        parameter.data, parameter.grad = x, grad
        optimizer.step()

    return step_of


def test_it_descends_as_fp32_moments_do_and_plain_fp8_does_not():
    exact, expanded, plain = _descend(_theirs()), _descend(_ours(True)), _descend(_ours(False))
    start = exact[0].norm()
    assert exact[-1].norm() < start / 10
    assert (expanded - exact).norm(dim=1).max() < start / 10
    assert (plain - exact)[-1].norm() > start


def test_one_step_is_adamws():
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 300, generator=generator).unbind(0)
    ours, parameter = x.clone(), torch.nn.Parameter(x.clone())
    numbers = NUMBERS | {"epsilon": 1e-8, "weight_decay": 0.1}
    adamw_fp8(ours, grad, Fp8Moment.zeros(300), Fp8Moment.zeros(300), step=1, **numbers)
    parameter.grad = grad
    torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-7)
