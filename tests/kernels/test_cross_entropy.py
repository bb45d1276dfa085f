import pytest
import torch
import torch.nn.functional as F

from moray.kernels.cross_entropy import cross_entropy_sum


def _case(dtype):
    hidden = torch.randn(13, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 9, (13,))
    targets[4] = -100
    return hidden, weight, targets, (targets >= 0) & (torch.arange(13) != 7)


@pytest.mark.parametrize("chunk", [1, 4, 13, None])
def test_equals_full_logits_with_gradients(chunk):
    hidden, weight, targets, keep = _case(torch.float64)
    loss, count = cross_entropy_sum(hidden, weight, targets, keep, chunk)
    full = F.cross_entropy((hidden @ weight.t())[keep], targets[keep], reduction="sum")
    assert count == 11
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(loss / count, (hidden, weight))
    theirs = torch.autograd.grad(full / count, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0]])
    loss, _ = cross_entropy_sum(hidden, torch.eye(2), torch.tensor([1]), torch.tensor([True]))
    assert loss.item() == 1e4


def test_bfloat16_gradients_come_in_bfloat16_from_a_float32_loss():
    hidden, weight, targets, keep = _case(torch.bfloat16)
    loss, _ = cross_entropy_sum(hidden, weight, targets, keep, 4)
    loss.backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    cross_entropy_sum(*wide, targets, keep)[0].backward()
    assert loss.dtype == torch.float32
    for ours, exact in zip((hidden, weight), wide, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        # BF16 has 8 significant bits; logits, probabilities and results are each rounded once.
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0.05, atol=0.05)


def test_nothing_counted_is_zero_with_zero_gradients():
    hidden, weight, targets, _ = _case(torch.float64)
    loss, count = cross_entropy_sum(hidden, weight, targets, torch.zeros(13, dtype=torch.bool))
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_without_gradients_no_graph_is_kept():
    hidden, weight, targets, keep = _case(torch.float64)
    with torch.no_grad():
        assert not cross_entropy_sum(hidden, weight, targets, keep)[0].requires_grad
