import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.router import route, route_reference, route_triton
from tests.examples import examples

LOGITS = torch.zeros(64, 256, requires_grad=True)
SPECIMENS = {
    "route": lambda: route_triton(LOGITS, torch.zeros(256), top_k=8, n_group=8, topk_group=4)[1].sum().backward(),
    "route without groups": lambda: (
        route_triton(LOGITS, torch.zeros(256), top_k=8, normalise=False)[1].sum().backward()
    ),
    "route small": lambda: route_triton(LOGITS[:, :64].contiguous(), torch.zeros(64), top_k=6)[1].sum().backward(),
}
# Their sigmoids and the sums of any two of them differ by more than 1e-3, also modulo 1; the last's is exactly 1.
GRID = torch.tensor([-3.0, -1.1, 0.2, 0.9, 2.3, 40.0])


@st.composite
def _routings(draw):
    n_group = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 5))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, topk_group * per_group))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    experts = n_group * per_group
    logits_TE = torch.randn(draw(st.integers(0, 9)), experts, dtype=torch.float64, generator=generator) * 3
    bias_E = torch.randn(experts, generator=generator)
    return logits_TE, bias_E, {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}


def _expected_ids(choice_E, top_k, n_group, topk_group):
    """The published rule for one token, in plain Python."""
    groups = [row.tolist() for row in choice_E.view(n_group, -1)]
    per_group = len(groups[0])
    best = sorted(range(n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))[:topk_group]
    allowed = [g * per_group + i for g in best for i in range(per_group)]
    return set(sorted(allowed, key=lambda e: -choice_E[e].item())[:top_k])


@given(_routings())
@settings(max_examples=examples(40), deadline=None)
def test_laws(case):
    logits_TE, bias_E, numbers = case
    ids_TK, weights_TK, counts_E = route(logits_TE, bias_E, **numbers, scale=2.5)
    scores_TE = logits_TE.sigmoid()
    for t in range(len(logits_TE)):
        assert set(ids_TK[t].tolist()) == _expected_ids(scores_TE[t] + bias_E, **numbers)
        chosen = scores_TE[t, ids_TK[t]]
        torch.testing.assert_close(weights_TK[t], 2.5 * chosen / chosen.sum(), rtol=1e-12, atol=0)
    assert counts_E.tolist() == torch.bincount(ids_TK.flatten(), minlength=len(bias_E)).tolist()
    assert counts_E.sum() == len(logits_TE) * numbers["top_k"]


def test_bias_moves_the_selection_and_not_the_weights():
    logits_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    ids, weights, _ = route(logits_TE, torch.tensor([0.0, 0.0, 0.0, 5.0]), top_k=1, normalise=False)
    assert ids.tolist() == [[3]]
    torch.testing.assert_close(weights, torch.tensor([[-1.0]]).sigmoid())


def test_equal_scores_go_to_the_lower_id():
    ids, _, _ = route(torch.full((3, 8), 40.0), torch.zeros(8), top_k=3, n_group=4, topk_group=2)
    assert ids.tolist() == [[0, 1, 2]] * 3


def test_negative_choices_of_kept_groups_beat_dropped_groups():
    bias_E = torch.tensor([-9.0, -9.0, -2.0, -9.0])
    ids, _, _ = route(torch.zeros(1, 4), bias_E, top_k=2, n_group=2, topk_group=1)
    assert ids.tolist() == [[2, 3]]


def test_weights_are_differentiable():
    logits_TE = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route(x, torch.zeros(8), top_k=3)[1], logits_TE)


def test_the_grid_is_as_far_apart_as_it_says():
    scores = GRID.double().sigmoid().tolist()
    assert GRID.sigmoid()[-1] == 1.0
    numbers = [0.0, *scores[:-1]] + [a + b for i, a in enumerate(scores[:-1]) for b in scores[i:-1]]
    fractions = sorted(number % 1 for number in numbers)
    assert all(b - a > 1e-3 for a, b in zip(fractions, [*fractions[1:], fractions[0] + 1], strict=True))


@st.composite
def _separated(draw):
    """Logits whose biased scores are equal or far apart, so that every form must choose the same experts."""
    n_group, members = draw(
        st.sampled_from([(1, 1), (1, 8), (1, 37), (2, 4), (3, 5), (8, 8), (5, 2), (8, 32), (1, 256)])
    )
    experts = n_group * members
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, min(8, experts)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.sampled_from([0, 1, 7, 33])), experts)
    logits_TE = GRID[torch.randint(0, draw(st.integers(1, len(GRID))), shape, generator=generator)]
    # One bias for a group: sums of equal scores under other biases are equal too, but not once they are rounded.
    bias_E = torch.randint(-2, 2, (n_group,), generator=generator).float().repeat_interleave(members)
    if topk_group == n_group:
        bias_E = torch.randint(-2, 2, (experts,), generator=generator).float()
    numbers = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    return logits_TE, bias_E, numbers | {"normalise": draw(st.booleans()), "scale": draw(st.sampled_from([1.0, 2.5]))}


@given(_separated(), st.integers(0, 2**31))
@settings(max_examples=examples(25))
def test_triton_chooses_the_references_experts(case, seed):
    logits_TE, bias_E, options = case
    logits_TE.requires_grad_()
    found, expected = (
        implementation(logits_TE, bias_E, **options) for implementation in (route_triton, route_reference)
    )
    assert found[0].dtype == found[2].dtype == torch.int64
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    # A sigmoid, a sum of eight and a quotient: a few roundings of FP32 (2^-24 each).
    torch.testing.assert_close(found[1], expected[1], rtol=2e-6, atol=0)
    grad_TK = torch.randn(expected[1].shape, generator=torch.Generator().manual_seed(seed))
    ours, theirs = (torch.autograd.grad(weights_TK, logits_TE, grad_TK)[0] for _, weights_TK, _ in (found, expected))
    # Differences of numbers up to about 10, each rounded a few times.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


def test_triton_takes_sixteen_experts():
    logits_TE = GRID[torch.randint(0, 6, (3, 40))]
    ids, _, counts = route_triton(logits_TE, torch.zeros(40), top_k=16)
    assert torch.equal(ids, route_reference(logits_TE, torch.zeros(40), top_k=16)[0])
    assert counts.sum() == 48


@pytest.mark.parametrize("implementation", [route_reference, route_triton])
def test_extreme_logits(implementation):
    """Saturated scores tie, scores of zero stay finite, infinities are saturated scores."""
    logits_TE = torch.tensor([[30.0, 40.0, math.inf, 0.0], [-200.0, -300.0, -math.inf, -400.0]], requires_grad=True)
    ids, weights, _ = implementation(logits_TE, torch.zeros(4), top_k=3)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3] * 3, [0.0] * 3]))
    weights.sum().backward()
    assert logits_TE.grad.isfinite().all()
    ids, _, _ = implementation(torch.zeros(1, 6), torch.tensor([-math.inf, 1.0, 2.0, -math.inf, 3.0, 3.0]), top_k=6)
    assert ids.tolist() == [[4, 5, 2, 1, 0, 3]]
    ids, _, _ = implementation(torch.zeros(1, 6), torch.zeros(6), top_k=5, n_group=3, topk_group=2)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]  # one more than the groups hold
    bias_E = torch.tensor([0.0] * 5 + [1.0] * 5 + [2.0] * 5)
    ids, _, _ = implementation(torch.zeros(1, 15), bias_E, top_k=15, n_group=3, topk_group=1)
    assert ids.tolist() == [[10, 11, 12, 13, 14, *range(10)]]


@pytest.mark.parametrize("implementation", [route_reference, route_triton])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_is_chosen_first_and_shows_in_the_weights(implementation, normalise, sign):
    logits_TE = torch.tensor([[1.0, 2.0, 3.0, math.copysign(math.nan, sign), 0.0, 1.0], [0.0] * 6])
    ids, weights, counts = implementation(
        logits_TE, torch.zeros(6), top_k=3, n_group=3, topk_group=2, normalise=normalise
    )
    assert ids.tolist() == [[3, 2, 1], [0, 1, 2]]
    assert weights.isnan().tolist() == [[True, normalise, normalise], [False] * 3]
    assert counts.tolist() == [1, 2, 2, 1, 0, 0]


def test_float64_is_routed_by_the_reference_and_cpus_run_triton_on_demand(monkeypatch):
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    logits_TE = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route(x, torch.zeros(8), top_k=3)[1], logits_TE)
    narrow_TE = logits_TE.detach().float()
    ids, weights, _ = route(narrow_TE.t().contiguous().t(), torch.zeros(8), top_k=3)
    assert torch.equal(ids, route(logits_TE, torch.zeros(8), top_k=3)[0])
    assert weights.dtype == torch.float32
    with pytest.raises(ValueError, match=r"logits_TE has dtype torch.bfloat16, expected torch.float32"):
        route(narrow_TE.bfloat16(), torch.zeros(8), top_k=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k = 0, expected 1 to 8"),
        ({"top_k": 9}, r"top_k = 9, expected 1 to 8"),
        ({"top_k": 1, "n_group": 3}, r"n_group = 3, expected a divisor of 8"),
        ({"top_k": 1, "n_group": 2, "topk_group": 3}, r"topk_group = 3, expected 1 to 2"),
        ({"top_k": 1, "n_group": 8}, r"n_group = 8, expected at least two of 8 experts per group"),
    ],
)
def test_wrong_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        route_triton(torch.zeros(2, 8), torch.zeros(8), **options)


def test_wrong_tensors_are_named():
    with pytest.raises(ValueError, match=r"bias_E has shape \(7,\), expected \(8\)"):
        route_triton(torch.zeros(2, 8), torch.zeros(7), top_k=1)
    with pytest.raises(ValueError, match=r"logits_TE has strides \(1, 2\), expected a contiguous tensor"):
        route_triton(torch.zeros(8, 2).t(), torch.zeros(8), top_k=1)
    with pytest.raises(ValueError, match=r"bias_E is on device meta, expected cpu"):
        route_triton(torch.zeros(2, 8), torch.zeros(8, device="meta"), top_k=1)
