import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moray
from moray.models.dispatch import LocalDispatcher

RANKS = Path(__file__).with_name("expert_parallel_ranks.py")


def test_local_rows_are_sorted_by_expert_and_come_home():
    dispatcher = LocalDispatcher(4)
    rows_TD = torch.arange(6.0).view(3, 2)
    ids_TK = torch.tensor([[3, 0], [0, 1], [3, 1]])
    handle = dispatcher.dispatch(rows_TD, rows_TD[:, :1], ids_TK)
    assert handle.rows_RD[:, 0].tolist() == [0, 2, 2, 4, 0, 4]
    assert handle.scales.flatten().tolist() == [0, 2, 2, 4, 0, 4]
    assert handle.counts_E.tolist() == [2, 2, 0, 2]
    home_TKD = dispatcher.combine(handle, handle.rows_RD)
    assert torch.equal(home_TKD, rows_TD[:, None].expand(3, 2, 2))


@pytest.mark.cluster
def test_process_groups_equal_one_process(tmp_path):
    """EP=2 and EP=4 over gloo, outputs and gradients in float64; see expert_parallel_ranks.py for the cases."""
    environment = os.environ | {"PYTHONPATH": moray.__path__[0]}
    command = [sys.executable, RANKS, tmp_path / "store"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
