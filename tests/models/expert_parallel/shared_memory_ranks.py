"""The ranks of test_shared_memory.py."""

import pytest
import torch
import torch.distributed as dist

from moray.models.expert_parallel import shared_memory
from moray.models.expert_parallel.all_to_all import AllToAll
from moray.models.expert_parallel.shared_memory import IN_FLIGHT, connect


def _counts(number, ranks):
    """Number of rows that rank i sends to rank j, sometimes 0."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 4, (ranks, ranks), generator=generator).tolist()


def _rows(number, sender, receiver, count):
    return torch.full((count, 3), 100.0 * number + 10 * sender + receiver, dtype=torch.float64)


def check_many_exchanges():
    """More exchanges than inboxes, as many in flight as allowed, read in the order of writes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    all_to_all = AllToAll(dist.group.WORLD, memory=connect(dist.group.WORLD))
    in_flight = []

    def finish():
        number, pending = in_flight.pop(0)
        counts = _counts(number, ranks)
        expected = [_rows(number, sender, rank, counts[sender][rank]) for sender in range(ranks)]
        assert torch.equal(pending.wait(), torch.cat(expected)), number

    for number in range(60):
        counts = _counts(number, ranks)
        rows = torch.cat([_rows(number, rank, to, counts[rank][to]) for to in range(ranks)])
        in_flight.append((number, all_to_all.start(rows, counts[rank], [row[rank] for row in counts])))
        while len(in_flight) > number % (IN_FLIGHT + 1) or len(in_flight) == IN_FLIGHT:
            finish()
    while in_flight:
        finish()


def check_limits():
    """Too many exchanges in flight, and reads out of order, raise errors."""
    ranks = dist.get_world_size()
    memory = connect(dist.group.WORLD)
    parts = [torch.zeros(1)] * ranks
    numbers = [memory.write(parts) for _ in range(IN_FLIGHT)]
    with pytest.raises(RuntimeError, match="exchanges are in flight"):
        memory.write(parts)
    dist.barrier()
    with pytest.raises(AssertionError, match="in the order of writes"):
        memory.read(numbers[1], [1] * ranks, torch.zeros(1))
    assert memory.read(numbers[0], [1] * ranks, torch.zeros(1)).tolist() == [0.0] * ranks


def check_all_ranks_connect_or_none():
    rank = dist.get_rank()
    host = shared_memory._host
    for change in ({"_host": lambda: f"{host()} {rank % 2}"}, {"_create": lambda size: None}):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in change.items():
                if name == "_host" or rank == 1:
                    patch.setattr(shared_memory, name, value)
            assert connect(dist.group.WORLD) is None
    assert connect(dist.group.WORLD) is not None
