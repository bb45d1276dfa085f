import torch

from moray.kernels.fp8_rows import Fp8Rows
from moray.kernels.wire import quantize_rows
from moray.models.expert_parallel.dispatcher import LocalDispatcher
from tests.models.expert_parallel.layer_ranks import check_all, routing_to


def _sent(rows_TD, ids_TK, weights_TK, fp8=False):
    dispatch = LocalDispatcher().dispatch(rows_TD, routing_to(ids_TK, weights_TK, 4), fp8)
    dispatch.start_dispatch()
    return dispatch, dispatch.wait_dispatch()


def test_local_rows_are_sorted_by_expert_and_their_sums_are_combined():
    rows_TD = torch.arange(6.0).view(3, 2)
    ids_TK, weights_TK = torch.tensor([[3, 0], [0, 1], [3, 1]]), torch.arange(6.0).view(3, 2)
    dispatch, (rows_RD, weights_R, counts_L, offsets_L1) = _sent(rows_TD, ids_TK, weights_TK)
    assert offsets_L1 is None
    assert rows_RD[:, 0].tolist() == [0, 2, 2, 4, 0, 4]
    assert weights_R.tolist() == [1, 2, 3, 5, 0, 4]
    assert counts_L.tolist() == [2, 2, 0, 2]
    dispatch.start_combine(rows_RD * weights_R[:, None])
    assert torch.equal(dispatch.wait_combine(), rows_TD * weights_TK.sum(1, keepdim=True))


def test_gradients_flow_through_dispatch_and_combine():
    x_TD, weights_TK = (torch.randn(5, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    ids_TK = torch.tensor([[0, 1], [3, 0], [2, 1], [1, 3], [0, 2]])

    def dispatch_and_combine(x_TD, weights_TK):
        dispatch, (rows_RD, weights_R, *_) = _sent(x_TD, ids_TK, weights_TK)
        dispatch.start_combine(rows_RD.sin() * torch.arange(1.0, 11.0)[:, None] * weights_R[:, None])
        return dispatch.wait_combine()

    assert torch.autograd.gradcheck(dispatch_and_combine, (x_TD, weights_TK))


def test_fp8_dispatch_gives_rows_and_result_gradients_in_fp8_but_not_sums():
    x_TD = torch.randn(5, 200, requires_grad=True)
    dispatch, (rows_RD, weights_R, counts_L, offsets_L1) = _sent(
        x_TD, torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5), fp8=True
    )
    assert isinstance(rows_RD, Fp8Rows)
    assert (offsets_L1.tolist(), counts_L.tolist()) == ([0, 128, 256, 256, 256], [5, 5, 0, 0])
    at_R = [*range(5), *range(128, 133)]
    read = quantize_rows(x_TD.detach()).dequantized()
    assert torch.equal(rows_RD.dequantized()[at_R], read.repeat(2, 1))
    assert weights_R[at_R].tolist() == [0.5] * 10
    assert weights_R.sum() == 5  # 0 between experts
    results_RD = torch.randn(len(rows_RD), 200, requires_grad=True)
    gradients = []
    results_RD.register_hook(gradients.append)
    dispatch.start_combine(results_RD)
    combined_TD = dispatch.wait_combine()
    assert torch.equal(combined_TD, results_RD[:5] + results_RD[128:133])
    factors_TD = torch.randn(5, 200)
    (combined_TD * factors_TD).sum().backward()
    assert isinstance(gradients[0], Fp8Rows)
    assert torch.equal(gradients[0].dequantized()[at_R], quantize_rows(factors_TD).dequantized().repeat(2, 1))
    (rows_RD * results_RD.detach()).sum().backward()
    assert torch.equal(x_TD.grad, results_RD.detach()[:5] + results_RD.detach()[128:133])


def test_process_groups_equal_one_process(ranks):
    """EP=2 and EP=4 over gloo, outputs and gradients in float64; see layer_ranks.py for the cases."""
    ranks.run(4, check_all)
