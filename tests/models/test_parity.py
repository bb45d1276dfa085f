"""Our model against transformers' DeepseekV3ForCausalLM: logits, loss, gradients, and folders both ways."""

import pytest
import torch
import torch.nn.functional as F

from moray.models.checkpoint import load, save

modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

VARIANTS = {
    "everything": {},
    "plain queries": {"q_lora_rank": None},
    "no groups": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts, raw weights": {"n_shared_experts": 2, "norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 3},
    "no dense, top 1, other constants": {
        "first_k_dense_replace": 0,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,  # one normalised weight is 1, and its gradient rounding noise
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-4,
    },
}


class _WideTorch:
    """torch with FP32 meaning FP64: transformers computes norms, scores and angles in FP32 whatever the model is."""

    def __getattr__(self, name):
        return getattr(torch, {"float32": "float64", "float": "float64"}.get(name, name))


def _theirs(folder, dtype):
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return modeling.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


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


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_float64_logits_loss_and_gradients(variant, make_model, logical_grads, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling, "torch", _WideTorch())
    save(make_model(torch.float32, **variant), tmp_path)
    ours, theirs = load(tmp_path, torch.float64).train(), _theirs(tmp_path, torch.float64)
    ids, targets = torch.randint(0, 50, (2, 2, 21)).unbind(0)
    their_logits = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours(ids).logits, their_logits, rtol=1e-9, atol=1e-9)

    nll, count = ours.loss_sum(ids, targets)
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(nll / count, their_loss, rtol=1e-10, atol=0)
    (nll / count).backward()
    their_loss.backward()
    for name, grad in logical_grads(ours).items():
        expected = _their_grad(theirs, name)
        # Relative to the tensor's own largest gradient.
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_float32_logits(variant, make_model, tmp_path):
    # Weights of a trained model's size: at the fixture's 0.3, logits of 30 would take 1e-4 for themselves.
    model = make_model(torch.float32, initializer_range=0.1, **variant).eval()
    save(model, tmp_path)
    ids = torch.randint(0, 50, (2, 21))
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
