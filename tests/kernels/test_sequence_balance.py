"""The sequence-wise balance loss: the published sum, and Triton against the reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.sequence_balance import sequence_balance, sequence_balance_reference, sequence_balance_triton
from tests.examples import examples

LOGITS = torch.zeros(64, 256, requires_grad=True)
COUNTED = torch.ones(64, dtype=torch.bool)
SPECIMENS = {
    "sequence balance": lambda: sequence_balance_triton(LOGITS, 8, 2).backward(),
    "sequence balance, some counted": lambda: sequence_balance_triton(LOGITS, 8, 2, COUNTED).backward(),
}


@given(
    sequences=st.integers(1, 3),
    length=st.integers(0, 7),
    experts=st.integers(2, 6),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=examples(40), deadline=None)
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


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 2**31))
def test_balance_looks_at_counted_tokens_and_weighs_sequences(counted, seed):
    """As if the others were not there; a sequence without any adds nothing."""
    logits_BTE = torch.randn(len(counted), 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask_BT = torch.tensor(counted)
    weights_B = torch.arange(len(counted)) + 2
    expected = torch.zeros((), dtype=torch.float64)
    for logits_TE, mask_T, weight in zip(logits_BTE, mask_BT, weights_B, strict=True):
        if mask_T.any():
            expected = expected + weight * sequence_balance(logits_TE[mask_T], 2, 1) / mask_T.sum()
    found = sequence_balance(logits_BTE.flatten(0, 1), 2, len(counted), mask_BT.flatten(), weights_B)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_an_even_load_has_a_balance_loss_of_one_per_token():
    logits_TE = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    torch.testing.assert_close(sequence_balance(logits_TE, 1, 3), torch.tensor(12.0, dtype=torch.float64))


@given(
    sequences=st.integers(0, 3),
    length=st.integers(0, 70),
    experts=st.sampled_from([2, 5, 8, 256]),
    counted=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=examples(20))
def test_triton_equals_the_reference(sequences, length, experts, counted, weighted, seed, data):
    """Logits are apart by more than the difference of sigmoids, so that both choose the same experts."""
    top_k = data.draw(st.integers(1, min(experts, 8)))
    generator = torch.Generator().manual_seed(seed)
    tokens = sequences * length
    order_TE = torch.rand(tokens, experts, generator=generator).argsort(1)
    logits_TE = torch.linspace(-3, 3, experts)[order_TE].requires_grad_()
    mask_T = torch.rand(tokens, generator=generator) < 0.7 if counted else None
    weights_B = torch.arange(1.0, sequences + 1) if weighted else None
    results = []
    for balance in (sequence_balance_reference, sequence_balance_triton):
        loss = balance(logits_TE, top_k, sequences, mask_T, weights_B)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits_TE)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_scores_choose_the_lower_expert_in_both():
    logits_TE = torch.full((3, 8), 40.0)
    expected = sequence_balance_reference(logits_TE, 2, 1)
    torch.testing.assert_close(sequence_balance_triton(logits_TE, 2, 1), expected)
