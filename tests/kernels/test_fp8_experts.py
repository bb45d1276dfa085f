"""A group of experts in FP8: both backends against float64 products of the same quantized numbers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels import tuning
from moray.kernels.fp8_experts import (
    Factor,
    fp8_expert_weights,
    fp8_experts,
    fp8_mlp,
    stack_gradient_bf16,
    stack_gradient_fp8,
)
from moray.kernels.quantize import COLUMN_TILES, ROW_TILES, WEIGHT_BLOCKS, dequantize, quantize, quantize_both
from tests.examples import examples
from tests.kernels.compare import draw


def _seen(x, tiles):
    """The numbers behind the FP8 form of x, in float64."""
    return dequantize(*quantize(x.float(), tiles, power_of_two=True), tiles).double()


def _weights(experts, hidden, inner, seed):
    gate, up = (draw((experts, inner, hidden), -3, seed=seed + i).requires_grad_() for i in (1, 2))
    return gate, up, draw((experts, hidden, inner), -3, seed=seed + 3).requires_grad_()


def _expected(x, weights, dy, gate, up, down):
    """One expert, step by step: (y, gradients of x, the rows' weights, gate, up, down)."""
    w_gate, w_up, w_down = (_seen(w.detach(), WEIGHT_BLOCKS) for w in (gate, up, down))
    g, u = _seen(x, ROW_TILES) @ w_gate.t(), _seen(x, ROW_TILES) @ w_up.t()
    weights = weights.detach().double().unsqueeze(1).requires_grad_()
    y = _seen(F.silu(g.float()) * u.float() * weights.detach().float(), ROW_TILES) @ w_down.t()
    g, u = (_seen(h, ROW_TILES).requires_grad_() for h in (g, u))
    inner = F.silu(g) * u * weights
    inner.backward(_seen(dy, ROW_TILES) @ w_down)
    dx = _seen(g.grad, ROW_TILES) @ w_gate + _seen(u.grad, ROW_TILES) @ w_up
    x_turned = _seen(x, COLUMN_TILES)
    d_gate, d_up = _seen(g.grad, COLUMN_TILES).t() @ x_turned, _seen(u.grad, COLUMN_TILES).t() @ x_turned
    d_down = _seen(dy, COLUMN_TILES).t() @ _seen(inner.detach(), COLUMN_TILES)
    return y, dx, weights.grad.squeeze(1), d_gate, d_up, d_down


def _off(found, expected):
    error, size = (found.double() - expected).norm().item(), expected.norm().item()
    return error / size if size else error


# Intermediate results are FP32 here and float64 there, so a number on the edge between two E4M3 numbers may fall to the
# other side: with few rows, one such number is 0.4 %. A wrong tile, scale or row would be off by more than FP8's 2 %.
EDGES = 1e-2


@given(
    counts=st.sampled_from([(5,), (0, 128), (130, 0, 7), (0, 0, 1)]),
    hidden=st.sampled_from([64, 200]),
    inner=st.sampled_from([96, 128]),
    backend=st.sampled_from(["reference", "triton"]),
    bf16=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(8))
def test_forward_and_backward(counts, hidden, inner, backend, bf16, seed):
    weights = _weights(len(counts), hidden, inner, seed)
    sizes = [-(-count // 128) * 128 for count in counts]
    offsets = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    end = sum(sizes)
    x, dy = torch.zeros(end + 128, hidden), torch.zeros(end + 128, hidden)
    w = draw((end + 128,), seed=seed).requires_grad_()
    starts = offsets.tolist()[:-1]
    for begin, count in zip(starts, counts, strict=True):
        x[begin : begin + count] = draw((count, hidden), seed=seed + 10 + begin)
        dy[begin : begin + count] = draw((count, hidden), seed=seed + 11 + begin)
    x.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORAY_KERNELS", backend)
        patch.setattr("moray.kernels.fp8_experts.weight_gradients_in_bf16", lambda device: bf16)
        y = fp8_experts(x, w, offsets, fp8_expert_weights(*weights), *weights)
        y.backward(dy)
    for expert, (begin, size) in enumerate(zip(starts, sizes, strict=True)):
        part = slice(begin, begin + size)
        matrices = [weight[expert] for weight in weights]
        y_, dx, dw, *gradients = _expected(x.detach()[part], w[part], dy[part], *matrices)
        assert _off(y.detach()[part], y_) < EDGES
        assert _off(x.grad[part], dx) < EDGES
        assert _off(w.grad[part], dw) < EDGES
        for weight, gradient in zip(weights, gradients, strict=True):
            assert weight.grad.dtype == torch.float32
            assert _off(weight.grad[expert], gradient) < EDGES


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_dense_mlp_is_one_expert_of_any_number_of_rows(backend, monkeypatch):
    monkeypatch.setenv("MORAY_KERNELS", backend)
    weights = _weights(1, 64, 96, 5)
    x = draw((37, 64)).requires_grad_()
    dy = draw((37, 64), seed=1)
    y = fp8_mlp(x, fp8_expert_weights(*weights), *weights)
    y.backward(dy)
    y_, dx, *_ = _expected(x.detach(), torch.ones(37), dy, *(weight[0] for weight in weights))
    assert y.shape == (37, 64)
    assert _off(y.detach(), y_) < EDGES
    assert _off(x.grad, dx) < EDGES


def test_rows_in_bf16_stay_in_bf16():
    weights = _weights(1, 64, 96, 5)
    x = draw((37, 64), dtype=torch.bfloat16).requires_grad_()
    y = fp8_mlp(x, fp8_expert_weights(*weights), *weights)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weights[0].grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("counts", [(256, 0, 128), (0, 0), (128,)])
def test_weight_gradients_in_bf16_are_those_in_fp8(counts, is_transposed):
    rows = sum(counts) + 128  # the last ones belong to no expert
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    dy, x = (
        Factor(*quantize_both(draw((rows, columns), seed=columns), power_of_two=True)[is_transposed], is_transposed)
        for columns in (64, 200)
    )
    dy.scales[-1], x.scales[-1] = (float("nan"),) * 2 if not is_transposed else (dy.scales[-1], x.scales[-1])
    found, expected = (form(dy, x, offsets) for form in (stack_gradient_bf16, stack_gradient_fp8))
    assert found.shape == expected.shape == (len(counts), 64, 200)
    assert _off(found, expected.double()) < 2.0**-7


def test_the_precision_of_weight_gradients_is_the_faster_measured_one(monkeypatch):
    device = torch.device("cpu")
    for table, expected in (
        ({}, False),
        ({"weight_gradient_ms": {"fp8": 5.0, "bf16": 4.5}}, True),
        ({"weight_gradient_ms": {"fp8": 4.0, "bf16": 4.5}}, False),
    ):
        monkeypatch.setattr(tuning, "_table", lambda _, table=table: table)
        assert tuning.weight_gradients_in_bf16(device) == expected
