"""Strategies for multiplying by the weights of linear layers and experts. Each module has one, its `compute`.

A weight is high precision (FP32, BF16, FP64) or stored in FP8. A high-precision weight may be trained in FP8. Its
gradient is computed in the backward or deferred (`kernels/util/deferred.py`). A new module is high precision.
`DeepseekV3` replaces the strategies of all its modules in `store_fp8`, and in `train_in_fp8` and `defer_gradients`,
which share `TrainingCompute`:

    weights          gradients   Linear                SwiGLU             ExpertShard            used by
    high precision   backward    HighPrecisionLinear   UnfusedSwiGLU      HighPrecisionExperts   training, inference
    high precision   deferred    DeferredLinear        UnfusedSwiGLU      HighPrecisionExperts   ranks that overlap
    trained in FP8   either      Fp8TrainedLinear      Fp8TrainedSwiGLU   Fp8TrainedExperts      `precision: fp8`
    stored in FP8    none        Fp8StoredLinear       UnfusedSwiGLU      Fp8StoredExperts       inference in FP8

Notable: `UnfusedSwiGLU` calls the module's three linear layers, whose own strategies apply. In FP8 training, gate and
up are one GEMM instead, and their own strategies are not used.

Shapes: T tokens, R rows of experts, E experts of the shard, D hidden size, F expert hidden size, N outputs, K inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor

from moray.kernels.experts import experts, experts_fp8
from moray.kernels.fp8_experts import Fp8Experts, fp8_expert_weights, fp8_experts, fp8_mlp
from moray.kernels.fp8_linear import Fp8Weight, fp8_linear, fp8_linears, fp8_weight
from moray.kernels.quantize import BLOCK, dequantize
from moray.kernels.util.deferred import DeferredGradients, deferred_linear
from moray.models.expert_parallel.stages import ExpertRows
from moray.models.fp8 import QuantizationCache

Form = TypeVar("Form", Fp8Weight, Fp8Experts)


class LinearCompute(Protocol):
    """Computes x @ weight^T in x's dtype. `scales` are those of a weight stored in FP8, [N / 128, K / 128], else
    None."""

    def __call__(self, x: Tensor, weight_NK: Tensor, scales: Tensor | None) -> Tensor: ...


class HighPrecisionLinear:
    def __call__(self, x: Tensor, weight_NK: Tensor, scales: Tensor | None) -> Tensor:
        return F.linear(x, weight_NK.to(x.dtype))


@dataclass(frozen=True)
class DeferredLinear:
    deferred: DeferredGradients

    def __call__(self, x: Tensor, weight_NK: Tensor, scales: Tensor | None) -> Tensor:
        return deferred_linear(x, weight_NK, self.deferred)


@dataclass(frozen=True)
class Fp8TrainedLinear:
    """shared_input: another operation saves the input for the backward anyway (`kernels/fp8_linear.py`)."""

    quantization: QuantizationCache[Fp8Weight]
    deferred: DeferredGradients | None = None
    shared_input: bool = False

    def __call__(self, x: Tensor, weight_NK: Tensor, scales: Tensor | None) -> Tensor:
        return fp8_linear(x, weight_NK, self.quantization.get(weight_NK), self.shared_input, self.deferred)

    @staticmethod
    def several(x: Tensor, layers: Sequence[tuple["Fp8TrainedLinear", Tensor]]) -> tuple[Tensor, ...]:
        """The outputs of several layers of one input, each a strategy and its weight, which quantize it once."""
        weights = [weight_NK for _, weight_NK in layers]
        quantized = [strategy.quantization.get(weight_NK) for strategy, weight_NK in layers]
        return fp8_linears(x, weights, quantized, deferred=layers[0][0].deferred)


class Fp8StoredLinear:
    def __call__(self, x: Tensor, weight_NK: Tensor, scales: Tensor | None) -> Tensor:
        assert scales is not None
        return F.linear(x, dequantize(weight_NK, scales, (BLOCK, BLOCK), x.dtype))


class LinearLayer(Protocol):
    """A linear layer with its weight."""

    @property
    def weight(self) -> Tensor: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class SwiGLUCompute(Protocol):
    """Computes down(silu(gate(x)) * up(x)) of one MLP."""

    def __call__(self, x_TD: Tensor, gate: LinearLayer, up: LinearLayer, down: LinearLayer) -> Tensor: ...


class UnfusedSwiGLU:
    def __call__(self, x_TD: Tensor, gate: LinearLayer, up: LinearLayer, down: LinearLayer) -> Tensor:
        return down(F.silu(gate(x_TD)) * up(x_TD))


@dataclass(frozen=True)
class Fp8TrainedSwiGLU:
    quantization: QuantizationCache[Fp8Experts]
    deferred: DeferredGradients | None = None

    def __call__(self, x_TD: Tensor, gate: LinearLayer, up: LinearLayer, down: LinearLayer) -> Tensor:
        weights = (gate.weight, up.weight, down.weight)
        return fp8_mlp(x_TD, self.quantization.get(*weights), *weights, self.deferred)


def _one_expert(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, keep_transpose: bool) -> Fp8Experts:
    return fp8_expert_weights(gate_FD[None], up_FD[None], down_DF[None], keep_transpose)


class ExpertStacks(NamedTuple):
    """The three stacked weights of a shard's experts, or their scales."""

    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor


class ExpertsCompute(Protocol):
    """Computes the experts' outputs, times the router's weights: [R, D]. `scales` are those of stacks stored in FP8,
    else None."""

    @property
    def fp8_rows(self) -> bool:
        """Whether rows must be `Fp8Rows`. They are sent in FP8 then."""

    def __call__(self, rows: ExpertRows, stacks: ExpertStacks, scales: ExpertStacks | None) -> Tensor: ...


@dataclass(frozen=True)
class HighPrecisionExperts:
    deferred: DeferredGradients | None = None
    fp8_rows: ClassVar[bool] = False

    def __call__(self, rows: ExpertRows, stacks: ExpertStacks, scales: ExpertStacks | None) -> Tensor:
        return experts(rows.rows_RD, rows.weights_R, rows.counts_L, *stacks, self.deferred)


@dataclass(frozen=True)
class Fp8TrainedExperts:
    quantization: QuantizationCache[Fp8Experts]
    deferred: DeferredGradients | None = None
    fp8_rows: ClassVar[bool] = True

    def __call__(self, rows: ExpertRows, stacks: ExpertStacks, scales: ExpertStacks | None) -> Tensor:
        assert rows.offsets_L1 is not None, "the dispatcher pads FP8 rows"
        quantized = self.quantization.get(*stacks)
        return fp8_experts(rows.rows_RD, rows.weights_R, rows.offsets_L1, quantized, *stacks, self.deferred)


class Fp8StoredExperts:
    fp8_rows: ClassVar[bool] = False

    def __call__(self, rows: ExpertRows, stacks: ExpertStacks, scales: ExpertStacks | None) -> Tensor:
        assert scales is not None
        gate, up, down = zip(stacks, scales, strict=True)
        return experts_fp8(rows.rows_RD, rows.weights_R, rows.counts_L, gate, up, down)


@dataclass(frozen=True)
class TrainingCompute:
    """Strategies of a model with high-precision weights. fp8: train in FP8. keep_transposes: of quantized weights, for
    later backwards. deferred: defer weight gradients."""

    fp8: bool = False
    keep_transposes: bool = True
    deferred: DeferredGradients | None = None

    def linear(self, quantized: bool, shared_input: bool) -> LinearCompute:
        """Strategy of a linear layer. quantized: whether FP8 training quantizes its weight."""
        if self.fp8 and quantized:
            return Fp8TrainedLinear(self._cache(fp8_weight), self.deferred, shared_input)
        return HighPrecisionLinear() if self.deferred is None else DeferredLinear(self.deferred)

    def swiglu(self) -> SwiGLUCompute:
        return Fp8TrainedSwiGLU(self._cache(_one_expert), self.deferred) if self.fp8 else UnfusedSwiGLU()

    def experts(self) -> ExpertsCompute:
        if self.fp8:
            return Fp8TrainedExperts(self._cache(fp8_expert_weights), self.deferred)
        return HighPrecisionExperts(self.deferred)

    def _cache(self, make: Callable[..., Form]) -> QuantizationCache[Form]:
        return QuantizationCache(partial(make, keep_transpose=self.keep_transposes))
