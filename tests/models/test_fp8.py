import dataclasses

import pytest
import torch

from moray.kernels.fp8_linear import fp8_weight
from moray.models.compute import Fp8TrainedExperts, Fp8TrainedLinear, Fp8TrainedSwiGLU
from moray.models.fp8 import QuantizationCache
from moray.models.model import DeepseekV3
from moray.models.presets import preset

SMALL = dataclasses.replace(
    preset("tiny"),
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_nextn_predict_layers=1,
)


def test_a_quantization_is_cached_until_a_weight_changes():
    weight, other = torch.nn.Parameter(torch.randn(20, 10)), torch.nn.Parameter(torch.randn(20, 10))
    cache = QuantizationCache(lambda *weights: [fp8_weight(w) for w in weights])
    first = cache.get(weight, other)
    assert cache.get(weight, other) is first
    for fused in (True, False):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        weight.grad = torch.ones_like(weight)
        before = cache.get(weight, other)
        optimizer.step()
        after = cache.get(weight, other)
        assert after is not before
        assert not torch.equal(after[0].dequantized, before[0].dequantized)
    with torch.no_grad():
        other.detach().zero_()  # as a checkpoint is loaded
    assert not cache.get(weight, other)[1].dequantized.any()


def _trained(precision, recompute=False, steps=25):
    torch.manual_seed(0)
    model = DeepseekV3(SMALL)
    model.init_weights(1)
    model.train()
    model.set_recompute("v3" if recompute else "none")
    if precision != "float32":
        model.compute_in(torch.bfloat16)
    if precision == "fp8":
        model.train_in_fp8()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    losses = []
    for _ in range(steps):
        ids = (torch.randint(0, 64, (16, 1)) + 7 * torch.arange(17)) % 64  # learnable: a step of seven
        terms = model.training_loss(ids[:, :-1], ids[:, 1:])
        loss = (terms.main + 0.3 * terms.mtp) / terms.count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((terms.main / terms.count).item())
    return losses


@pytest.mark.evidence
def test_training_in_bf16_and_fp8_stays_close_to_training_in_fp32():
    wide, bf16, fp8 = _trained("float32"), _trained("bf16"), _trained("fp8")
    assert wide != bf16 != fp8
    assert wide[-1] < wide[0] / 2
    assert all(abs(a - b) < 0.005 * a for a, b in zip(wide, bf16, strict=True))
    assert all(abs(a - b) < 0.02 * a for a, b in zip(wide, fp8, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_recompute_changes_no_bit(precision):
    assert _trained(precision, steps=2) == _trained(precision, recompute=True, steps=2)


@pytest.mark.parametrize("kept", [True, False])
def test_the_transposed_form_is_kept_by_choice(kept):
    weight = fp8_weight(torch.randn(130, 200), kept)
    first, again = weight.transposed, weight.transposed
    assert torch.equal(first[0].view(torch.uint8), weight.fp8.t().view(torch.uint8))
    assert torch.equal(first[1], weight.scales.t())
    assert (first[0] is again[0]) == kept
    weight.clear()
    weight.fill(fp8_weight(torch.zeros(130, 200), kept))
    assert not weight.transposed[0].float().any()


def test_modules_that_do_not_compute_in_fp8():
    model = DeepseekV3(SMALL)
    model.train_in_fp8()
    modules = dict(model.named_modules())
    trained = (Fp8TrainedLinear, Fp8TrainedSwiGLU, Fp8TrainedExperts)
    plain = {name for name, module in modules.items() if not isinstance(getattr(module, "compute", None), trained)}
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"} <= plain
    assert not any(
        name.endswith(("o_proj", "q_b_proj", "kv_b_proj", "mlp.experts", "shared_experts")) for name in plain
    )
    assert "model.layers.0.mlp" not in plain
    assert [module.compute.shared_input for name, module in modules.items() if name.endswith("o_proj")] == [True] * 4
