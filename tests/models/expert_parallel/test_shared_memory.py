"""Memory that ranks of one host share: see shared_memory_ranks.py."""

import pytest

from tests.models.expert_parallel.shared_memory_ranks import (
    check_all_ranks_connect_or_none,
    check_limits,
    check_many_exchanges,
)


@pytest.mark.parametrize("world", [2, 3])
def test_written_rows_are_read(ranks, world):
    ranks.run(world, check_many_exchanges)


def test_misuse_raises_errors(ranks):
    ranks.run(2, check_limits)


def test_all_ranks_connect_or_none(ranks):
    ranks.run(4, check_all_ranks_connect_or_none)
