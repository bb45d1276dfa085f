"""The policy by which Ray Serve chooses the number of replicas."""

from types import SimpleNamespace

import pytest

from moray.pipelines.serve.scaling import TOKENS, TokensPolicy
from moray.pipelines.serve.sequence import Request


@pytest.mark.parametrize(
    ("tokens", "replicas"),
    [
        ({"a": 0.0}, 1),
        ({"a": 100.0}, 1),
        ({"a": 101.0}, 2),
        ({"a": 150.0, "b": 151.0}, 4),
        ({"a": 1e6, "b": 0.0}, 10_000),
    ],
)
def test_each_replica_gets_so_many_tokens(tokens: dict[str, float], replicas: int) -> None:
    context = SimpleNamespace(aggregated_metrics={TOKENS: tokens}, target_num_replicas=7)
    assert TokensPolicy(100)(context) == (replicas, {})


@pytest.mark.parametrize("metrics", [None, {}, {TOKENS: {}}])
def test_without_reports_nothing_changes(metrics: object) -> None:
    assert TokensPolicy(100)(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=7)) == (7, {})


def test_tokens_in_flight_are_those_still_to_read_or_write(make_engine) -> None:
    engine = make_engine()
    engine.submit(Request(prompt=(5, 6, 7), max_tokens=4, temperature=0.0, ignore_eos=True))
    left = [sum(one.tokens_left for one in engine.sequences)]
    while engine.busy:
        engine.step()
        left.append(sum(one.tokens_left for one in engine.sequences))
    assert left == [8, 3, 2, 1, 0]  # bos and three ids, then four new ones, the first of which comes with the prompt
