import math
from collections import Counter

import pytest
import torch

from moray.pipelines.serve.sampler import Draw, sample, score_tokens

GREEDY = Draw(temperature=0.0, top_p=1.0, generator=None, logprobs=None)


def warm(seed: int, temperature: float = 1.0, top_p: float = 1.0) -> Draw:
    return Draw(temperature, top_p, torch.Generator().manual_seed(seed), None)


def test_temperature_zero_takes_the_largest():
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]])
    assert [token.id for token in sample(logits_BV, [GREEDY, GREEDY])] == [1, 0]


def test_a_tiny_temperature_does_not_overflow():
    assert sample(torch.tensor([[1e4, 1e4 - 1, 0.0]]), [warm(0, 1e-9)])[0].id == 0


def test_frequencies_follow_the_distribution():
    """5,000 draws: the standard error of a share is at most 0.0071, so 0.03 is over four of them."""
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    tokens = sample(logits_V.expand(5000, 4), [warm(7)] * 5000)
    counts = Counter(token.id for token in tokens)
    assert [counts[index] / 5000 for index in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_sharpens():
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    counts = Counter(token.id for token in sample(logits_V.expand(5000, 4), [warm(7, temperature=0.5)] * 5000))
    assert [counts[index] / 5000 for index in range(4)] == pytest.approx((shares / shares.sum()).tolist(), abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    logits_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    tokens = sample(logits_V.expand(400, 3), [warm(3, top_p=top_p)] * 400)
    assert {token.id for token in tokens} == kept


def test_an_id_of_probability_zero_is_never_drawn():
    logits_V = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for top_p in (1.0, 0.99):
        tokens = sample(logits_V.expand(500, 5), [warm(5, top_p=top_p)] * 500)
        assert {token.id for token in tokens} == {1, 3}


def test_an_answer_does_not_depend_on_the_rest_of_the_batch():
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    settings = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.3, 1.0), (1.0, 0.5), (2.0, 0.99)]

    def draw(row: int) -> Draw:
        temperature, top_p = settings[row]
        return GREEDY if temperature == 0 else warm(row, temperature, top_p)

    together = [token.id for token in sample(logits_BV, [draw(row) for row in range(6)])]
    alone = [sample(logits_BV[row : row + 1], [draw(row)])[0].id for row in range(6)]
    assert together == alone


def test_log_probabilities_are_of_the_model_not_of_the_temperature():
    logits_BV = torch.tensor([[0.0, 2.0, 1.0]])
    draw = Draw(0.1, 1.0, torch.Generator().manual_seed(0), 2)
    token = sample(logits_BV, [draw])[0]
    expected = logits_BV.log_softmax(-1)[0].tolist()
    assert token.logprob == pytest.approx(expected[token.id])
    assert [index for index, _ in token.top] == [1, 2]
    assert [value for _, value in token.top] == pytest.approx([expected[1], expected[2]])


def test_rows_get_as_many_alternatives_as_each_asked_for():
    tokens = score_tokens(torch.randn(3, 4), [0, 1, 2], [0, 9, 1])
    assert [len(token.top) for token in tokens] == [0, 4, 1]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.3, 0), (0.95, 0), (0.999999, 0), (1.0, 40), (0.9, 40), (0.9, 3000)])
def test_the_most_likely_of_a_large_vocabulary_are_those_of_a_sort(top_p, top_k, monkeypatch):
    """Whether few ids are sorted or all of them; flat rows keep more than the few."""
    logits_BV = torch.randn(24, 5000, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 6, 24)[:, None]
    draws = [Draw(1.0, top_p, torch.Generator().manual_seed(row), None, top_k=top_k) for row in range(24)]
    few = [token.id for token in sample(logits_BV, draws)]
    monkeypatch.setattr("moray.pipelines.serve.sampler._HEAD", 1 << 20)
    draws = [Draw(1.0, top_p, torch.Generator().manual_seed(row), None, top_k=top_k) for row in range(24)]
    assert few == [token.id for token in sample(logits_BV, draws)]


def test_the_lowest_draw_skips_ids_of_probability_zero(monkeypatch):
    monkeypatch.setattr("moray.pipelines.serve.sampler._uniform", lambda generator: 0.0)
    assert sample(torch.tensor([[-math.inf, 0.0, 1.0]]), [warm(0)])[0].id == 1


@pytest.mark.parametrize(("top_k", "kept"), [(1, {0}), (2, {0, 1}), (3, {0, 1, 2}), (9, {0, 1, 2}), (0, {0, 1, 2})])
def test_top_k_keeps_the_most_likely(top_k, kept):
    logits_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    draw = Draw(1.0, 1.0, torch.Generator().manual_seed(3), None, top_k=top_k)
    assert {token.id for token in sample(logits_V.expand(400, 3), [draw] * 400)} == kept


def test_top_p_is_of_what_top_k_keeps():
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    draw = Draw(1.0, 0.7, torch.Generator().manual_seed(3), None, top_k=2)  # 4/7 and 3/7 of the two
    assert {token.id for token in sample(logits_V.expand(400, 4), [draw] * 400)} == {0, 1}


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.0, {0, 1, 2}), (0.39, {0, 1, 2}), (0.41, {0, 1}), (0.61, {0}), (1.0, {0})]
)
def test_min_p_is_over_the_largest(min_p, kept):
    logits_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    draw = Draw(1.0, 1.0, torch.Generator().manual_seed(3), None, min_p=min_p)
    assert {token.id for token in sample(logits_V.expand(400, 3), [draw] * 400)} == kept


def test_an_adjustment_changes_its_row_only_and_no_log_probability():
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])

    def ban(logits_V: torch.Tensor) -> None:
        logits_V[1] = -math.inf

    tokens = sample(logits_BV, [Draw(0.0, 1.0, None, 0, adjust=ban), Draw(0.0, 1.0, None, 0)])
    assert [token.id for token in tokens] == [2, 1]
    assert tokens[0].logprob == pytest.approx(logits_BV[0].log_softmax(-1)[2].item())
    assert logits_BV[0, 1] == 3.0
