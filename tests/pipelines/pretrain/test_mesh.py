"""The rank layout."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.pretrain.mesh import Mesh, even_runs, grid, host_number
from tests.ranks import RankPool


@given(nodes=st.integers(1, 5), width=st.integers(1, 5), blocks=st.integers(1, 4))
def test_rows_and_columns_of_every_block_partition_it(nodes: int, width: int, blocks: int) -> None:
    size = nodes * width
    lines = [grid(rank, size, width) for rank in range(size * blocks)]
    for rank, (row, column) in enumerate(lines):
        assert rank in row
        assert rank in column
        assert len(row) == width
        assert len(column) == nodes
        assert {other // size for other in (*row, *column)} == {rank // size}
        assert all(lines[other][0] == row for other in row)
        assert all(lines[other][1] == column for other in column)


def test_the_ranks_of_a_node_are_the_runs_of_its_host() -> None:
    assert even_runs([7, 7, 7, 7]) == 4
    assert even_runs([7, 7, 3, 3, 9, 9]) == 2
    assert even_runs([7, 3, 9]) == 1
    assert even_runs([7, 7, 3]) == 1, "uneven"
    assert even_runs([7, 7, 3, 3, 7, 7]) == 1, "apart"


def made_groups() -> tuple[bool, int, int, list[int]]:
    """Of EP 2 with nodes as found, and of EP 4 with two ranks a node."""
    cpu = torch.device("cpu")
    found = Mesh.create(2, cpu)
    nodes = Mesh.create(4, cpu, node_ranks=2).node_groups
    assert nodes is not None
    assert Mesh.create(4, cpu).edp_group is None
    between, within = (dist.get_process_group_ranks(group) for group in nodes)
    return found.node_groups is None, host_number(), between[0], within


def test_ranks_make_the_groups_of_their_nodes(ranks: RankPool) -> None:
    found = ranks.run(4, made_groups)
    assert [one for one, *_ in found] == [True] * 4, "one host is one node"
    assert len({number for _, number, *_ in found}) == 1
    assert [(between, within) for *_, between, within in found] == [(0, [0, 1]), (1, [0, 1]), (0, [2, 3]), (1, [2, 3])]
