import dataclasses

import pytest
import torch

from moray.kernels.attention import causal_attention
from moray.kernels.documents import find_documents


def _inputs(batch, length):
    q, k = torch.randn(2, batch, length, 3, 12, dtype=torch.float64, requires_grad=True).unbind(0)
    return q, k, torch.randn(batch, length, 3, 8, dtype=torch.float64, requires_grad=True)


def _plain(q, k, v, scale, seen_BTT):
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    weights = scores.masked_fill(~seen_BTT[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("lengths_on_host", [True, False])
@pytest.mark.parametrize("ids", [None, [[1, 1, 1, 2, 2, 3, 3], [5, 5, 5, 5, 5, 5, 5]], [[1] * 7, [1] * 7]])
def test_equals_plain_softmax_with_gradients(ids, lengths_on_host):
    q, k, v = _inputs(2, 7)
    documents = None
    seen = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    if ids is not None:
        ids = torch.tensor(ids)
        documents = find_documents(ids)
        if not lengths_on_host:
            documents = dataclasses.replace(documents, lengths=None)
        seen &= ids[:, :, None] == ids[:, None, :]
    ours, plain = causal_attention(q, k, v, 0.3, documents), _plain(q, k, v, 0.3, seen)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    factor = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * factor).sum(), (q, k, v)),
        torch.autograd.grad((plain * factor).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_wide_values_are_refused():
    q, k, _ = _inputs(1, 2)
    with pytest.raises(ValueError, match="value heads of 20"):
        causal_attention(q, k, torch.zeros(1, 2, 3, 20, dtype=torch.float64), 1.0)
