"""The mixture: a pure function of the step, with every sequence once per epoch and exact shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.epoch_permutation import permuted
from moray.actors.data.mixture import Mixture
from tests.examples import examples

sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 50), min_size=1)
plans = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=4).map(
    lambda parts: BatchPlan(
        tuple(itertools.accumulate((steps for steps, _ in parts[:-1]), initial=0)), tuple(size for _, size in parts)
    )
)


@given(st.integers(1, 3000), st.text(max_size=5))
def test_a_permutation_has_every_element_once(n: int, key: str) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


def test_permutations_look_random() -> None:
    """Over 4,000 keys, the 24 orders of four elements are equally frequent: chi-squared, p = 1e-6."""
    counts: dict[tuple[int, ...], int] = {}
    for key in range(4000):
        order = tuple(permuted(np.arange(4), 4, str(key)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 4000 / 24) ** 2 / (4000 / 24) for count in counts.values()) < 70.5
    far = permuted(np.arange(10**6), 10**6, "x")
    assert abs(np.corrcoef(far[:-1], far[1:])[0, 1]) < 0.006
    assert abs(np.corrcoef(far, np.arange(10**6))[0, 1]) < 0.006


def test_an_element_of_a_huge_permutation_is_computed_alone() -> None:
    n = 10**15 + 37
    places = np.array([0, 1, 2, n - 1, n // 2])
    found = permuted(places, n, "epoch 3")
    assert len(set(found.tolist())) == 5
    assert ((found >= 0) & (found < n)).all()
    assert permuted(places[3:4], n, "epoch 3")[0] == found[3]


@given(plans, st.integers(0, 60))
def test_a_plan_adds_up(plan: BatchPlan, step: int) -> None:
    assert plan.before(step) == sum(plan.size(earlier) for earlier in range(step))
    assert sum(steps for _, steps in plan.parts(step)) == step


@pytest.mark.parametrize(("starts", "numbers"), [((), ()), ((1,), (4,)), ((0, 5, 5), (1, 2, 3)), ((0,), (0,))])
def test_an_invalid_plan_is_refused(starts: tuple[int, ...], numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="plan"):
        BatchPlan(starts, numbers)


@settings(max_examples=examples(60))
@given(sizes, st.integers(0, 9), plans, st.integers(0, 60))
def test_a_batch_does_not_depend_on_the_requested_slots(
    sizes: dict[str, int], seed: int, plan: BatchPlan, step: int
) -> None:
    whole = np.array(Mixture(sizes, {}, seed, plan).batch(step))
    assert whole.shape == (2, plan.size(step))
    for ranks in (1, 2, 3, 4, 8):
        bounds = [plan.size(step) * rank // ranks for rank in range(ranks + 1)]
        parts = [Mixture(sizes, {}, seed, plan).batch(step, a, b) for a, b in itertools.pairwise(bounds)]
        assert np.array_equal(np.concatenate(parts, axis=1), whole)


@settings(max_examples=examples(40))
@given(sizes, st.integers(0, 9), plans)
def test_every_sequence_occurs_once_per_epoch(sizes: dict[str, int], seed: int, plan: BatchPlan) -> None:
    """Also if batch sizes and ramps do not divide the epoch."""
    mixture = Mixture(sizes, {}, seed, plan)
    seen = [np.zeros(sizes[source], int) for source in mixture.sources]
    for step in range(80):
        assert mixture.drawn(step) == [int(counts.sum()) for counts in seen]
        sources, numbers = mixture.batch(step)
        assert np.bincount(sources, minlength=len(sizes)).tolist() == mixture.counts(step)
        for source in range(len(seen)):
            seen[source] += np.bincount(numbers[sources == source], minlength=len(seen[source]))
            assert np.ptp(seen[source]) <= 1, "a sequence came again before another had come"


@settings(max_examples=examples(100))
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(0, 10**9), st.integers(1, 300))
def test_any_batch_has_each_sources_share_to_one_sequence(weights: list[float], step: int, size: int) -> None:
    names = "abcdef"[: len(weights)]
    shares = np.array(weights) / sum(weights)
    mixture = Mixture(dict.fromkeys(names, 10), dict(zip(names, weights, strict=True)), 1, BatchPlan.constant(size))
    counts = np.array(mixture.counts(step))
    assert counts.sum() == size
    assert (np.abs(counts - size * shares) <= 1 + 1e-6).all()
    # And in the long run: a few sequences off, after any number of batches.
    assert (np.abs(np.array(mixture.drawn(step)) - step * size * shares) < 20).all()


def test_epochs_are_shuffled_differently() -> None:
    mixture = Mixture({"a": 30}, {}, 1, BatchPlan.constant(30))
    first, second = mixture.batch(0)[1], mixture.batch(1)[1]
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.sort(second))


def test_another_source_does_not_change_the_order_of_the_others() -> None:
    alone = Mixture({"b": 30}, {}, 1, BatchPlan.constant(30))
    both = Mixture({"a": 30, "b": 30}, {}, 1, BatchPlan.constant(60))
    sources, numbers = both.batch(0)
    assert set(numbers[sources == 1].tolist()) == set(alone.batch(0)[1].tolist())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"z": 1.0}, "the sources are a, b"),
        ({"a": -1.0}, "negative"),
        ({"a": float("inf")}, "finite"),
        ({"a": 0.0}, "at least one"),
    ],
)
def test_an_impossible_mixture_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture({"a": 3, "b": 3}, weights, 1, BatchPlan.constant(4))
