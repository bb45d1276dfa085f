"""A micro-batch without a sequence, as on a rank that has fewer than the others: a loss of zero, and no gradient."""

import pytest
import torch

from moray.models.model import DeepseekV3
from tests.models.expert_parallel.overlap_ranks import CONFIG


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("policy", ["none", "v3", "layer"])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8"])
def test_a_micro_batch_without_sequences(monkeypatch, kernels, policy, precision):
    monkeypatch.setenv("MORAY_KERNELS", kernels)
    model = DeepseekV3(CONFIG)
    model.init_weights(3)
    model.train()
    model.set_recompute(policy)
    if precision != "float32":
        model.compute_in(torch.bfloat16)
    if precision == "fp8":
        model.train_in_fp8()
    ids = torch.zeros(0, 8, dtype=torch.int64)
    loss = model.training_loss(ids, ids, ids)
    (loss.main + loss.mtp + loss.balance).backward()
    assert [float(term.detach()) for term in (loss.main, loss.mtp, loss.balance, loss.count)] == [0.0] * 4
    assert not model.router_counts().any()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
