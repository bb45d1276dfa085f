"""Which data workers the ranks ask."""

from collections import Counter
from types import SimpleNamespace

import pytest

from moray.pipelines.pretrain.loop import Loaders


@pytest.mark.parametrize(("world", "workers"), [(2048, 64), (2, 4), (3, 3), (7, 64), (1, 2)])
def test_all_data_workers_get_the_same_number_of_requests(world: int, workers: int) -> None:
    """Named after a run in which all ranks asked one worker in each step, so that of 64 two worked."""
    asked: list[int] = []

    def actor(number: int) -> SimpleNamespace:
        return SimpleNamespace(batch=SimpleNamespace(remote=lambda *slots: asked.append(number)))

    actors = [actor(number) for number in range(workers)]
    ranks = [Loaders(actors, rank, world) for rank in range(world)]
    for step in range(2 * workers):
        before = len(asked)
        for rank in ranks:
            rank.request(step, 0, 1)
        shares = Counter(asked[before:])
        assert max(shares.values()) - min([*shares.values(), *[0] * (workers - len(shares))]) <= 1
    assert set(Counter(asked).values()) == {2 * world}
