import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.router import route, sequence_balance


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
@settings(max_examples=40, deadline=None)
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


@given(
    sequences=st.integers(1, 3), length=st.integers(0, 7), experts=st.integers(2, 6), seed=st.integers(0, 2**31),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_sequence_balance_is_the_published_sum(sequences, length, experts, seed, data):
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(sequences * length, experts, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = torch.zeros((), dtype=torch.float64)
    for rows_TE in logits_TE.sigmoid().split(length) if length else ():
        for i in range(experts):
            chosen = sum(i in sorted(range(experts), key=lambda e: -row[e].item())[:top_k] for row in rows_TE)
            f_i = experts / (top_k * length) * chosen
            p_i = sum(row[i] / row.sum() for row in rows_TE) / length
            expected = expected + length * f_i * p_i
    found = sequence_balance(logits_TE, top_k, sequences)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    if length:
        ours, theirs = (torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_an_even_load_has_a_balance_loss_of_one_per_token():
    logits_TE = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    torch.testing.assert_close(sequence_balance(logits_TE, 1, 3), torch.tensor(12.0, dtype=torch.float64))
