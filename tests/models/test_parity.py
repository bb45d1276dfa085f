"""Our model against transformers' DeepseekV3ForCausalLM: logits, loss, gradients, and folders both ways.

Twenty configurations drawn at random from everything a config can say; each is the same on every run.
"""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

from moray.models.checkpoint import load, save
from moray.models.config import ModelConfig
from moray.models.mtp import shift_left
from moray.models.yarn import Yarn


def transformers(module):
    """Imported by the tests that need it, because it takes some seconds, which other tests should not wait for."""
    return pytest.importorskip(f"transformers.{module}")


def _deepseek_v3():
    return transformers("models.deepseek_v3.modeling_deepseek_v3")


def _drawn(seed):
    """A configuration from the whole space, small."""
    draw = random.Random(seed)
    n_group = draw.choice([1, 2, 4])
    per_group = draw.randint(2, 4)
    topk_group = draw.randint(1, n_group)
    depth = draw.randint(1, 3)
    nope, rope = draw.randint(1, 7), 2 * draw.randint(1, 4)
    top_k = draw.randint(1, min(4, topk_group * per_group))
    yarn = Yarn(
        factor=draw.choice([1.5, 4.0, 40.0]),
        original_max_position_embeddings=draw.choice([8, 64, 4096]),
        beta_fast=draw.choice([32.0, 4.0]),
        mscale=(mscale := draw.choice([1.0, 0.707])),
        mscale_all_dim=draw.choice([mscale, 1.0]),
    )
    return ModelConfig(
        vocab_size=draw.randint(20, 60),
        hidden_size=draw.randint(9, 33),
        intermediate_size=draw.randint(5, 40),
        moe_intermediate_size=draw.randint(3, 20),
        num_hidden_layers=depth,
        num_attention_heads=draw.randint(1, 4),
        n_routed_experts=n_group * per_group,
        num_experts_per_tok=top_k,
        kv_lora_rank=draw.randint(2, 12),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=draw.randint(1, nope + rope),
        q_lora_rank=draw.choice([None, draw.randint(2, 12)]),
        n_shared_experts=draw.randint(0, 2),
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        # One normalised weight is 1, and its gradient rounding noise.
        norm_topk_prob=top_k > 1 and draw.random() < 0.7,
        first_k_dense_replace=draw.randint(0, depth),
        max_position_embeddings=64,
        rope_theta=draw.choice([10000.0, 500.0]),
        rope_scaling=draw.choice([None, yarn]),
        rms_norm_eps=draw.choice([1e-6, 1e-4]),
        num_nextn_predict_layers=draw.randint(0, 2),
    )


SEEDS = range(20)


def test_the_draws_cover_the_space():
    """Every feature is on in some of the configurations and off in others."""
    drawn = [_drawn(seed) for seed in SEEDS]
    for feature in (
        lambda c: c.q_lora_rank is None,
        lambda c: c.rope_scaling is None,
        lambda c: c.rope_scaling is not None and c.rope_scaling.rotary_magnitude != 1,
        lambda c: c.n_shared_experts > 0,
        lambda c: c.topk_group < c.n_group,
        lambda c: c.norm_topk_prob,
        lambda c: c.first_k_dense_replace == 0,
        lambda c: c.first_k_dense_replace == c.num_hidden_layers,
        lambda c: c.num_nextn_predict_layers > 1,
        lambda c: c.num_nextn_predict_layers == 0,
        lambda c: c.v_head_dim == c.qk_head_dim or c.v_head_dim < c.qk_head_dim,
    ):
        assert any(feature(config) for config in drawn)
    assert len({config.num_experts_per_tok for config in drawn}) >= 3


def _changes(seed):
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"initializer_range"}
    return {name: getattr(_drawn(seed), name) for name in names}


class _WideTorch:
    """torch with FP32 meaning FP64: transformers computes norms, scores and angles in FP32 whatever the model is."""

    def __getattr__(self, name):
        return getattr(torch, {"float32": "float64", "float": "float64"}.get(name, name))


def _theirs(folder, dtype):
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return _deepseek_v3().DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def _their_grad(model, name):
    """Their experts are one parameter, gates above ups; ours are named one by one."""
    head, _, expert = name.partition(".experts.")
    if not expert:
        return model.get_parameter(name).grad
    index, projection, _ = expert.split(".")
    stacks = model.get_submodule(f"{head}.experts")
    if projection == "down_proj":
        return stacks.down_proj.grad[int(index)]
    return stacks.gate_up_proj.grad[int(index)].chunk(2)[projection == "up_proj"]


def _their_mtp(main, ours):
    """transformers' multi-token prediction layers, with our weights; their loader knows V3's layer number only."""
    module = (
        transformers("modeling_layers").MtpModel(main, ours.config.num_nextn_predict_layers).to(torch.float64).train()
    )
    parts = {"enorm", "hnorm", "eh_proj"}
    for index, layer in enumerate(ours.mtp_layers()):
        theirs = module.layers[index]
        theirs.post_norm.weight = torch.nn.Parameter(layer.shared_head.norm.weight.detach().clone())
        for name in parts:
            getattr(theirs, name).weight = torch.nn.Parameter(getattr(layer, name).weight.detach().clone())
        state = {}
        for name, value in layer.state_dict().items():
            if name.partition(".")[0] not in parts | {"shared_head"} and "mlp.experts." not in name:
                state[name] = value
        shard = layer.mlp.experts
        state["mlp.experts.gate_up_proj"] = torch.cat((shard.w_gate_EFD, shard.w_up_EFD), dim=1).detach()
        state["mlp.experts.down_proj"] = shard.w_down_EDF.detach()
        left = theirs.mtp_block.load_state_dict(state, strict=False)
        assert not left.unexpected_keys
        # Without shared experts they have some of width 0.
        assert not any(theirs.mtp_block.get_parameter(name).numel() for name in left.missing_keys)
    return module


def _their_losses(main, mtp, ids, targets):
    """Loss of the next token, and of the tokens further ahead averaged over the depths, each a sum."""
    out = main(input_ids=ids, output_hidden_states=True)
    nll = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    hidden, further = out.hidden_states[-1], 0.0
    positions = torch.arange(ids.shape[1])[None]
    depths = 0 if mtp is None else len(mtp.layers)
    for depth in range(1, depths + 1):
        hidden = mtp.forward_layer(depth - 1, hidden, positions, None, input_ids=shift_left(ids, depth, 0))
        logits = main.lm_head(hidden)
        shifted = shift_left(targets, depth, -100)
        further = further + F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / depths
    return out.logits, nll, further


@pytest.mark.parametrize("seed", SEEDS)
def test_float64_logits_loss_and_gradients(seed, make_model, logical_grads, tmp_path, monkeypatch):
    monkeypatch.setattr(_deepseek_v3(), "torch", _WideTorch())
    monkeypatch.setattr(transformers("modeling_rope_utils"), "torch", _WideTorch())
    save(make_model(torch.float32, seed, initializer_range=0.3, **_changes(seed)), tmp_path)
    ours, theirs = load(tmp_path, torch.float64).train(), _theirs(tmp_path, torch.float64)
    mtp = _their_mtp(theirs, ours) if ours.config.num_nextn_predict_layers else None
    ids, targets = torch.randint(0, ours.config.vocab_size, (2, 2, 21)).unbind(0)
    their_logits, their_main, their_further = _their_losses(theirs, mtp, ids, targets)
    torch.testing.assert_close(ours(ids).logits, their_logits, rtol=1e-9, atol=1e-9)

    loss = ours.training_loss(ids, targets)
    torch.testing.assert_close(loss.main, their_main, rtol=1e-10, atol=0)
    if mtp is not None:
        torch.testing.assert_close(loss.mtp, their_further, rtol=1e-10, atol=0)
    assert loss.count == targets.numel()
    ((loss.main + 0.3 * loss.mtp) / loss.count).backward()
    ((their_main + 0.3 * their_further) / targets.numel()).backward()
    own = range(ours.config.num_hidden_layers)
    for name, grad in logical_grads(ours).items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if layer is None or layer in own:
            expected = _their_grad(theirs, name)
        else:
            expected = _their_mtp_grad(mtp, layer - len(own), name.split(".", 3)[3])
        # Relative to the tensor's own largest gradient.
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item(), msg=name)


def _their_mtp_grad(mtp, depth, name):
    if name == "shared_head.norm.weight":
        return mtp.layers[depth].post_norm.weight.grad
    if name.partition(".")[0] in ("enorm", "hnorm", "eh_proj"):
        return mtp.layers[depth].get_parameter(name).grad
    return _their_grad(mtp.layers[depth].mtp_block, name)


@pytest.mark.parametrize("seed", SEEDS)
def test_float32_logits(seed, make_model, tmp_path):
    # Weights of a trained model's size: at 0.3, logits of 30 would take 1e-4 for themselves.
    model = make_model(torch.float32, seed, initializer_range=0.1, **_changes(seed)).eval()
    save(model, tmp_path)
    ids = torch.randint(0, model.config.vocab_size, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, _theirs(tmp_path, torch.float32)(ids).logits, rtol=0, atol=1e-4)


def test_their_folder_loads_here(make_model, tmp_path):
    save(make_model(torch.float32), tmp_path / "ours")
    theirs = _theirs(tmp_path / "ours", torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        ours = load(tmp_path / "theirs")
        assert torch.equal(ours(ids).logits, load(tmp_path / "ours")(ids).logits)
