import dataclasses

import torch

from moray.models.fp8 import Fp8Forms
from moray.models.model import DeepseekV3
from moray.models.presets import preset

SMALL = dataclasses.replace(
    preset("tiny"), vocab_size=64, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
    num_hidden_layers=3, num_nextn_predict_layers=1,
)  # fmt: skip


def test_a_form_lives_until_the_weight_changes_by_whatever_hand():
    weight = torch.nn.Parameter(torch.randn(3, 20, 10))
    forms = Fp8Forms()
    first = forms.of(weight, 1)
    assert forms.of(weight, 1) is first
    assert forms.of(weight, 0) is not first
    for fused in (True, False):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        weight.grad = torch.ones_like(weight)
        before = forms.of(weight, 1)
        optimizer.step()
        after = forms.of(weight, 1)
        assert after is not before
        assert not torch.equal(after.wide, before.wide)
    with torch.no_grad():
        weight.detach()[1].zero_()  # as a checkpoint is loaded
    assert not forms.of(weight, 1).wide.any()


def _trained(fp8, recompute=False, steps=25):
    torch.manual_seed(0)
    model = DeepseekV3(SMALL)
    model.init_weights(1)
    model.train()
    model.set_recompute(recompute)
    if fp8:
        model.train_in_fp8()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    losses = []
    for _ in range(steps):
        ids = (torch.randint(0, 64, (16, 1)) + 7 * torch.arange(17)) % 64  # learnable: a step of seven
        terms = model.training_loss(ids[:, :-1], ids[:, 1:])
        loss = (terms.main + 0.3 * terms.prediction) / terms.count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((terms.main / terms.count).item())
    return losses


def test_training_in_fp8_stays_close_to_training_in_fp32():
    wide, fp8 = _trained(False), _trained(True)
    assert wide != fp8
    assert wide[-1] < wide[0] / 2
    assert all(abs(a - b) < 0.02 * a for a, b in zip(wide, fp8, strict=True))


def test_recompute_changes_no_bit_in_fp8_either():
    assert _trained(True, steps=4) == _trained(True, recompute=True, steps=4)


def test_what_stays_out_of_fp8():
    model = DeepseekV3(SMALL)
    model.train_in_fp8()
    plain = {name for name, module in model.named_modules() if getattr(module, "forms", None) is None}
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"} <= plain
    assert not any(name.endswith(("o_proj", "q_b_proj", "kv_b_proj", "up_proj", "mlp.experts")) for name in plain)
    assert [module.e5m6 for name, module in model.named_modules() if name.endswith("o_proj")] == [True] * 4
