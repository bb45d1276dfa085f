import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moray.models.recompute import Recompute


def _step(model, ids, documents=None):
    model.zero_grad()
    model.reset_counters()
    terms = model.training_loss(ids, ids.flip(1), documents)
    (terms.main + terms.mtp + terms.balance).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", [{}, {"q_lora_rank": None, "v_head_dim": 10, "first_k_dense_replace": 0}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("policy", [("v3",), ("layer",), (2,), ("layer", True)])
def test_gradients_are_the_same_to_the_bit(make_model, policy, variant, dtype):
    model = make_model(dtype, num_nextn_predict_layers=1, **variant).train()
    ids = torch.randint(0, 50, (2, 16))
    documents = torch.tensor([[0] * 5 + [1] * 11] * 2)
    plain = _step(model, ids, documents)
    counts, loads = model.router_counts(), [shard.load_E.clone() for shard in model.shards()]
    model.set_recompute(*policy)
    again = _step(model, ids, documents)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    # Counted exactly once, also where the router runs again.
    assert torch.equal(model.router_counts(), counts)
    assert all(torch.equal(shard.load_E, load_E) for shard, load_E in zip(model.shards(), loads, strict=True))


def _held(model, ids):
    """Bytes that a forward leaves allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        terms = model.training_loss(ids, ids.flip(1))
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    terms.main.backward()
    return held


def test_recompute_saves_fewer_tensors_for_the_backward(make_model):
    sizes = {"hidden_size": 128, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    model = make_model(torch.float32, num_attention_heads=8, **sizes).train()
    ids = torch.randint(0, 50, (4, 64))
    plain = _held(model, ids)
    model.set_recompute("v3")
    only_v3 = _held(model, ids)
    # Queries, keys and values of 3 layers, 256 tokens, 8 heads, 36 elements, 4 bytes, alone:
    assert plain - only_v3 > 3 * 256 * 3 * 8 * 36 * 4
    model.set_recompute("layer")
    # The input of a layer, its experts, and what is outside of layers: ids, hidden states, the head's gradients.
    held = _held(model, ids)
    assert held < only_v3 / 2
    model.set_recompute(3)
    assert held < _held(model, ids) < only_v3


def test_evaluation_runs_plain(make_model):
    model = make_model()
    model.set_recompute("v3")
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_several_backwards_through_one_region():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    calls = []

    def region(x):
        calls.append(1)
        return (x @ weight).exp(), x.sin()

    with Recompute(True) as recompute:
        a, b = recompute.run(region, x)
        out = (a * b).sum()
        recompute.release()
    assert len(calls) == 1
    first = torch.autograd.grad(out, (x, weight), retain_graph=True)
    assert len(calls) == 2
    second = torch.autograd.grad(out, (x, weight))
    a, b = region(x)
    expected = torch.autograd.grad((a * b).sum(), (x, weight))
    for ours in (first, second):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))
