"""Memory that ranks of one host share: see peers_ranks.py."""

import pytest

from tests.models.expert_parallel.shared_memory_ranks import (
    check_limits,
    check_many_exchanges,
    check_nobody_connects_unless_all_can,
)


@pytest.mark.parametrize("world", [2, 3])
def test_what_was_written_is_read(ranks, world):
    ranks.run(world, check_many_exchanges)


def test_what_may_not_be_is_said(ranks):
    ranks.run(2, check_limits)


def test_nobody_connects_unless_all_can(ranks):
    ranks.run(4, check_nobody_connects_unless_all_can)
