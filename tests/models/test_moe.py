import pytest
import torch

from moray.kernels.quantize import quantize_rows_int8
from moray.models.checkpoint import load, save
from moray.models.moe import MoE, Router


def _moe(model):
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp, MoE)
    return mlp


def _run(moe, rows_TD):
    routing = moe.route(rows_TD, 1)
    dispatch = moe.dispatch(rows_TD, routing)
    dispatch.start_dispatch()
    dispatch.start_combine(moe.compute(dispatch.wait_dispatch()))
    return dispatch.wait_combine() + moe.local(rows_TD)


def test_stages_equal_a_sum_over_each_tokens_experts(make_model):
    moe = _moe(make_model())
    rows_TD = torch.randn(13, 24, dtype=torch.float64)
    routing = moe.route(rows_TD, 1)
    shard = moe.experts
    expected = moe.shared_experts(rows_TD)
    for t, row in enumerate(rows_TD):
        for expert, weight in zip(routing.ids_TK[t], routing.weights_TK[t], strict=True):
            inner = torch.nn.functional.silu(shard.w_gate_EFD[expert] @ row) * (shard.w_up_EFD[expert] @ row)
            expected[t] = expected[t] + weight * (shard.w_down_EDF[expert] @ inner)
    torch.testing.assert_close(_run(moe, rows_TD), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_rows_give_every_expert_a_gradient(make_model, tokens):
    moe = _moe(make_model())
    _run(moe, torch.randn(tokens, 24, dtype=torch.float64)).sum().backward()
    for stack in (moe.experts.w_gate_EFD, moe.experts.w_up_EFD, moe.experts.w_down_EDF):
        touched = [bool(stack.grad[e].any()) for e in range(8)]
        assert sum(touched) == 2 * tokens


def test_counts_accumulate_in_training_with_gradients_only(make_model):
    model = make_model()
    ids = torch.randint(0, 50, (2, 9))
    model.eval()(ids)
    with torch.no_grad():
        model.train()(ids)
    assert not model.router_counts().any()
    model(ids)
    model(ids)
    assert model.router_counts().sum(-1).tolist() == [2 * 2 * 9 * 2] * 2
    assert [int(shard.load_E.sum()) for shard in model.shards()] == [3 * 2 * 9 * 2] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_bias_stays_float32_and_exact(config, dtype):
    router = Router(config)
    router.e_score_correction_bias.fill_(0.001)
    router.to(dtype)
    assert router.weight.dtype == dtype
    assert torch.equal(router.e_score_correction_bias, torch.full((8,), 0.001))


def test_the_bias_is_state_and_the_counts_are_not(make_model):
    names = make_model().state_dict().keys()
    assert sum(name.endswith("e_score_correction_bias") for name in names) == 2
    assert not any(name.endswith(("counts_E", "load_E")) for name in names)


def test_int8_routers_choose_nearly_the_same_experts_and_keep_their_scales(make_model, tmp_path):
    model = make_model(torch.float32, hidden_size=64)
    save(model, tmp_path)
    small = load(tmp_path, int8_routers=True).to(torch.bfloat16)
    rows_TD = torch.randn(400, 64)
    for wide, router in zip(model.eval().routers(), small.routers(), strict=True):
        assert router.weight.dtype == torch.int8
        assert router.weight_scale_E1.dtype == torch.float32
        back_ED = router.weight * router.weight_scale_E1
        bound_E1 = wide.weight.abs().amax(-1, keepdim=True) / 127 / 2 * 1.0001
        assert ((back_ED - wide.weight).abs() <= bound_E1).all()
        same = wide(rows_TD, 1).ids_TK.sort(-1).values == router(rows_TD, 1).ids_TK.sort(-1).values
        assert same.float().mean() > 0.97


def test_a_router_row_of_zeros_stays_zero():
    int8, scales = quantize_rows_int8(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert (int8 * scales).tolist() == [[0.0, 0.0], pytest.approx([1.0, -2.0], abs=0.01)]
