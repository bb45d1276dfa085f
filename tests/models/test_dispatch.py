import pytest
import torch

from moray.kernels.wire import pack_rows, unpack_rows
from moray.models.dispatch import LocalDispatcher
from tests.models.expert_parallel_ranks import check_all


def test_local_rows_are_sorted_by_expert_and_come_home():
    dispatcher = LocalDispatcher(4)
    rows_TD = torch.arange(6.0).view(3, 2)
    ids_TK = torch.tensor([[3, 0], [0, 1], [3, 1]])
    dispatch = dispatcher.dispatch(rows_TD, ids_TK)
    dispatch.send()
    rows_RD, counts_E = dispatch.arrived()
    assert rows_RD[:, 0].tolist() == [0, 2, 2, 4, 0, 4]
    assert counts_E.tolist() == [2, 2, 0, 2]
    dispatch.send_back(rows_RD)
    home_TKD = dispatch.home()
    assert torch.equal(home_TKD, rows_TD[:, None].expand(3, 2, 2))


def test_gradients_take_the_way_back():
    dispatcher = LocalDispatcher(4)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.randint(0, 4, (5, 2))

    def there_and_back(x):
        dispatch = dispatcher.dispatch(x, ids_TK)
        dispatch.send()
        dispatch.send_back(dispatch.arrived()[0] * torch.arange(1.0, 11.0)[:, None])
        return dispatch.home()

    assert torch.autograd.gradcheck(there_and_back, x_TD)


def test_in_fp8_rows_go_and_gradients_of_results_too_but_sums_do_not():
    dispatcher = LocalDispatcher(4)
    x_TD = torch.randn(5, 200, requires_grad=True)
    dispatch = dispatcher.dispatch(x_TD, torch.tensor([[0, 1]] * 5), fp8=True)
    dispatch.send()
    rows_RD, _ = dispatch.arrived()
    read = unpack_rows(pack_rows(x_TD.detach()), 200, torch.float32)
    assert torch.equal(rows_RD, read.repeat(2, 1))
    results_RD = torch.randn(10, 200, requires_grad=True)
    dispatch.send_back(results_RD)
    home_TKD = dispatch.home()
    assert torch.equal(home_TKD, results_RD.unflatten(0, (2, 5)).transpose(0, 1))
    weights = torch.randn(5, 2, 200)
    (home_TKD * weights).sum().backward()
    expected = unpack_rows(pack_rows(weights.transpose(0, 1).flatten(0, 1)), 200, torch.float32)
    assert torch.equal(results_RD.grad, expected)
    (rows_RD * results_RD.detach()).sum().backward()
    assert torch.equal(x_TD.grad, results_RD.detach()[:5] + results_RD.detach()[5:])


@pytest.mark.cluster
def test_process_groups_equal_one_process(ranks):
    """EP=2 and EP=4 over gloo, outputs and gradients in float64; see expert_parallel_ranks.py for the cases."""
    ranks.run(4, check_all)
