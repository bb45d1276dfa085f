"""Kernels that are not launched allocate what launched ones do: outputs of the same shapes, and as many bytes at most.

The real ones run in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moray.kernels.adamw_fp8 import Fp8Moment, adamw_fp8
from moray.kernels.attention import causal_attention
from moray.kernels.cross_entropy import cross_entropy_sum
from moray.kernels.fp8_experts import fp8_expert_weights, fp8_experts
from moray.kernels.fp8_linear import fp8_linear, fp8_weight
from moray.kernels.permute import sum_slots
from moray.kernels.quantize import quantize, quantize_both
from moray.kernels.rms_norm import rms_norm
from moray.kernels.rope import rope, rope_table
from moray.kernels.router import route
from moray.kernels.wire import pack_rows, unpack_rows
from moray.models.expert_parallel.dispatcher import LocalDispatcher
from moray.models.expert_parallel.stages import Routing
from moray.pipelines.pretrain.memory import meter
from moray.pipelines.pretrain.memory.launches import no_launches
from moray.pipelines.pretrain.memory.meter import MemoryMeter
from tests.pipelines.pretrain.memory.real_steps import collected_launches

Make = Callable[..., Tensor]
BF16 = torch.bfloat16


def _linear(make: Make) -> list[Tensor]:
    x, w = make(40, 128, dtype=BF16), make(256, 128)
    return _with_gradients(fp8_linear(x, w, fp8_weight(w)), x, w)


def _experts(make: Make) -> list[Tensor]:
    x, w = make(60, 128, dtype=BF16), make(60)
    stacks = [make(2, 128, 128), make(2, 128, 128), make(2, 128, 128)]
    ids = torch.arange(60, device=x.device).unsqueeze(1) % 2
    handle = LocalDispatcher().dispatch(x, Routing(ids, w.unsqueeze(1), ids.new_full((2,), 30), None), fp8=True)
    handle.start_dispatch()
    rows = handle.wait_dispatch()
    quantized = fp8_expert_weights(*stacks)
    handle.start_combine(fp8_experts(rows.rows_RD, rows.weights_R, rows.offsets_L1, quantized, *stacks))
    return _with_gradients(handle.wait_combine(), x, w, *stacks)


def _attention(make: Make) -> list[Tensor]:
    q, k, v = make(1, 32, 2, 48), make(1, 32, 2, 48), make(1, 32, 2, 32)
    return _with_gradients(causal_attention(q, k, v, 0.1), q, k, v)


def _norm(make: Make) -> list[Tensor]:
    x, w = make(20, 64, dtype=BF16), make(64, dtype=BF16)
    return _with_gradients(rms_norm(x, w, 1e-6), x, w)


def _rope(make: Make) -> list[Tensor]:
    x = make(1, 10, 2, 16)
    table = rope_table(torch.arange(10, device=x.device).unsqueeze(0), 16, 1e4, torch.float32)
    return _with_gradients(rope(x, *table), x)


def _route(make: Make) -> list[Tensor]:
    logits, bias = make(20, 16), make(16).detach()
    ids, weights, counts = route(logits, bias, top_k=4, n_group=4, topk_group=2)
    return [ids, counts, *_with_gradients(weights, logits)]


def _cross_entropy(make: Make) -> list[Tensor]:
    hidden, weight = make(20, 32, dtype=BF16), make(100, 32, dtype=BF16)
    targets = torch.ones(20, dtype=torch.int64, device=hidden.device)
    loss, _ = cross_entropy_sum(hidden, weight, targets, targets > 0)
    return _with_gradients(loss, hidden, weight)


def _adamw(make: Make) -> list[Tensor]:
    master, gradient = make(300).detach(), make(300).detach()
    moments = [Fp8Moment.zeros(300, master.device) for _ in range(2)]
    numbers = {"rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
    adamw_fp8(master, gradient, *moments, step=1, **numbers)
    return [master, *(getattr(one, field.name) for one in moments for field in dataclasses.fields(one))]


def _wire(make: Make) -> list[Tensor]:
    packed = pack_rows(make(20, 256, dtype=BF16).detach())
    return [packed, unpack_rows(packed, 256, BF16).dequantized()]


def _quantized(make: Make) -> list[Tensor]:
    x = make(130, 256, dtype=BF16).detach()
    (one, two), (three, four) = quantize_both(x, power_of_two=True)
    return [one, two, three, four, *quantize(x, (128, 128), power_of_two=True)]


def _slots(make: Make) -> list[Tensor]:
    x = make(20, 64, dtype=BF16)
    places = torch.zeros(5, 4, dtype=torch.int64, device=x.device)
    return [sum_slots(x.detach(), places)]


def _with_gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize(
    "case",
    [_linear, _experts, _attention, _norm, _rope, _route, _cross_entropy, _adamw, _wire, _quantized, _slots],
    ids=lambda case: case.__name__[1:],
)
def test_launched_or_not_a_kernel_allocates_the_same(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_KERNELS", "triton")
    monkeypatch.setattr(meter, "_BLOCK", 1)

    def make(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device).requires_grad_()

    with collected_launches(), MemoryMeter() as real:
        launched = case(make)
    with no_launches(), MemoryMeter() as planned:
        not_launched = case(lambda *shape, **options: make(*shape, **options, device="meta"))
    for one, other in zip(launched, not_launched, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    if case in (_cross_entropy, _wire):  # whose CPU form converts what a GPU multiplies, or reads, as it is
        assert planned.device.peak <= real.host.peak
    else:
        assert planned.device.peak == pytest.approx(real.host.peak, rel=0.02)
    assert not planned.reads
