"""Invariants of a router, in a thousand cases each; and balance without an auxiliary loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moray.kernels.router import route
from tests.examples import examples

CASES = settings(max_examples=examples(1000))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Logits and biases of any size, with ties and saturation, and a valid choice of groups."""
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    members = draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, topk_group * members))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    experts, tokens = n_group * members, draw(st.integers(1, 9))
    logits_TE = scale * torch.randn(tokens, experts, generator=generator)
    if draw(st.booleans()):
        logits_TE = logits_TE.round()
    bias_E = draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0])) * torch.randn(experts, generator=generator)
    return {"logits_TE": logits_TE, "bias_E": bias_E, "top_k": top_k, "n_group": n_group, "topk_group": topk_group}


@CASES
@given(cases(), st.booleans(), st.sampled_from([1.0, 2.5]))
def test_invariants_hold_for_any_logits(case: dict[str, Any], normalise: bool, scale: float) -> None:
    ids_TK, weights_TK, counts_E = route(**case, normalise=normalise, scale=scale)
    check_weights(case, ids_TK, weights_TK / scale, normalise)
    check_counts(case, ids_TK, counts_E)
    check_groups(case, ids_TK)


def check_weights(case: dict[str, Any], ids_TK: Tensor, weights_TK: Tensor, normalise: bool) -> None:
    """They come from unbiased scores; transformers #41647 took them from biased ones."""
    chosen_TK = case["logits_TE"].double().sigmoid().gather(1, ids_TK)
    if normalise:
        chosen_TK = chosen_TK / (chosen_TK.sum(1, keepdim=True) + 1e-20)
    torch.testing.assert_close(weights_TK.double(), chosen_TK, rtol=1e-5, atol=1e-7)


def check_counts(case: dict[str, Any], ids_TK: Tensor, counts_E: Tensor) -> None:
    """Each token goes to different experts, and every pair is counted."""
    tokens, experts = case["logits_TE"].shape
    assert all(len(set(row)) == case["top_k"] for row in ids_TK.tolist())
    assert counts_E.tolist() == np.bincount(ids_TK.flatten().numpy(), minlength=experts).tolist()
    assert int(counts_E.sum()) == tokens * case["top_k"]


def check_groups(case: dict[str, Any], ids_TK: Tensor) -> None:
    """Every token stays within the groups whose two best biased scores sum highest, of equal ones the first."""
    members = case["logits_TE"].shape[1] // case["n_group"]
    choice_TE = case["logits_TE"].sigmoid() + case["bias_E"]
    for ids_K, choice_E in zip(ids_TK, choice_TE, strict=True):
        groups = {int(expert) // members for expert in ids_K}
        assert len(groups) <= case["topk_group"]
        if case["topk_group"] < case["n_group"]:
            sums = choice_E.view(case["n_group"], members).topk(2).values.sum(1)
            assert groups <= set(torch.sort(sums, descending=True, stable=True).indices[: case["topk_group"]].tolist())


@CASES
@given(cases(), st.floats(-3, 3))
def test_the_bias_changes_selection_only(case: dict[str, Any], shift: float) -> None:
    """The same bias more for all experts changes nothing but rounding; a bias far above all scores decides alone."""
    plain = {**case, "n_group": 1, "topk_group": 1}
    experts = case["logits_TE"].shape[1]
    order_E = torch.randperm(experts, generator=torch.Generator().manual_seed(int(shift * 1000) % 1000))
    ruling_E = torch.empty(experts)
    ruling_E[order_E] = torch.arange(experts, 0, -1.0) * 10
    ids_TK, weights_TK, _ = route(**{**plain, "bias_E": ruling_E})
    assert all(row == order_E[: case["top_k"]].tolist() for row in ids_TK.tolist())
    scores_TK = case["logits_TE"].sigmoid().gather(1, ids_TK)
    torch.testing.assert_close(weights_TK, scores_TK / (scores_TK.sum(1, keepdim=True) + 1e-20))


EXPERTS, TOP_K, TOKENS, WINDOW, SPEED = 16, 4, 512, 50, 1e-3
SKEW = torch.linspace(-1, 1, EXPERTS)  # of the mean logits: unbiased, the favourite gets 2.3 times its share


def max_vio(counts_E: Tensor) -> float:
    mean = counts_E.double().mean()
    return float((counts_E.max() - mean) / mean)


def window(generator: torch.Generator, skew_E: Tensor, bias_E: Tensor, speed: float) -> float:
    """MaxVio of all that is routed in a window of steps, the bias being moved after each by `speed`."""
    total_E = torch.zeros(EXPERTS, dtype=torch.int64)
    for _ in range(WINDOW):
        logits_TE = skew_E + torch.randn(TOKENS, EXPERTS, generator=generator)
        _, _, counts_E = route(logits_TE, bias_E, top_k=TOP_K)
        bias_E += speed * (counts_E.sum() - counts_E * EXPERTS).sign()
        total_E += counts_E
    return max_vio(total_E)


def test_a_skewed_stream_is_balanced_without_an_auxiliary_loss() -> None:
    """As well as chance would have it: MaxVio over 50 steps within three deviations of a router without preferences."""
    generator = torch.Generator().manual_seed(1)
    uniform = [window(generator, torch.zeros(EXPERTS), torch.zeros(EXPERTS), 0.0) for _ in range(20)]
    mean, deviation = float(np.mean(uniform)), float(np.std(uniform, ddof=1))
    bias_E = torch.zeros(EXPERTS)
    skewed = [window(generator, SKEW, bias_E, SPEED) for _ in range(16)]
    assert skewed[0] > 0.5, "the stream is skewed"
    assert max(skewed[-4:]) <= mean + 3 * deviation, (skewed, mean, deviation)
