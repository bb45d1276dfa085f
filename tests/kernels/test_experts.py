import pytest
import torch
import torch.nn.functional as F

from moray.kernels.experts import experts, experts_grouped
from moray.kernels.util.deferred import DeferredGradients


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]])
def test_equals_one_row_at_a_time_with_gradients(counts):
    rows, hidden, inner = sum(counts), 6, 5
    x = torch.randn(rows, hidden, dtype=torch.float64, requires_grad=True)
    w = torch.randn(rows, dtype=torch.float64, requires_grad=True)
    gate, up = torch.randn(2, 4, inner, hidden, dtype=torch.float64).unbind(0)
    stacks = [gate, up, torch.randn(4, hidden, inner, dtype=torch.float64)]
    for stack in stacks:
        stack.requires_grad_()
    owner = torch.arange(4).repeat_interleave(torch.tensor(counts))
    plain = torch.stack(
        [
            factor * (stacks[2][e] @ (F.silu(stacks[0][e] @ row) * (stacks[1][e] @ row)))
            for row, factor, e in zip(x, w, owner, strict=True)
        ]
        or [torch.zeros(hidden, dtype=torch.float64)]
    )[:rows]
    ours = experts(x, w, torch.tensor(counts), *stacks)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)

    grads = torch.autograd.grad(ours.sin().sum(), [x, w, *stacks])
    assert all(not grad[e].any() for grad in grads[2:] for e, n in enumerate(counts) if n == 0)
    if rows:
        for a, b in zip(grads, torch.autograd.grad(plain.sin().sum(), [x, w, *stacks]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]])
def test_a_grouped_gemm_equals_the_loop(counts, deferred):
    rows, hidden, inner = sum(counts), 16, 8
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, requires_grad=True)
    w = torch.rand(rows, requires_grad=True)
    stacks = [
        torch.randn(4, *shape, requires_grad=True) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    ]
    loop = experts(x, w, torch.tensor(counts), *stacks)
    expected = torch.autograd.grad(loop.sum(), [x, w, *stacks])
    queue = DeferredGradients() if deferred else None
    grouped = experts_grouped(x, w, torch.tensor(counts), *stacks, queue)
    torch.testing.assert_close(grouped, loop)
    grouped.sum().backward()
    if queue is not None:
        queue.finish()
    for tensor, gradient in zip((x, w, *stacks), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=2e-2, atol=1e-2)
