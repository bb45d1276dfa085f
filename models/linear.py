"""Modules that hold weights: a linear layer without bias, an embedding table, a norm.

Notable: a new weight is filled with NaN. Initialization and loading are explicit (`DeepseekV3.init_weights`,
`checkpoint.load`). If both omit a weight, the first loss is NaN, instead of the weight training from noise.
"""

from collections.abc import Callable, Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moray.kernels.embedding import embedding
from moray.kernels.quantize import BLOCK, dequantize
from moray.kernels.rms_norm import rms_norm
from moray.models.compute import Fp8StoredLinear, Fp8TrainedLinear, HighPrecisionLinear, LinearCompute
from moray.models.tensors import scale_shape


def unset_parameter(*shape: int) -> nn.Parameter:
    """A parameter of NaNs, to be initialized or loaded."""
    return nn.Parameter(torch.full(shape, float("nan")))


def unset_fp8(weight: Tensor) -> tuple[nn.Parameter, Tensor]:
    """An FP8 parameter of the weight's shape and its scales, all NaN. Leading axes are stacks of matrices."""
    bits = torch.full(weight.shape, 0x7F, dtype=torch.uint8, device=weight.device)
    stack, matrix = weight.shape[:-2], tuple(weight.shape[-2:])
    scales = torch.full((*stack, *scale_shape(matrix)), float("nan"), device=weight.device)
    return nn.Parameter(bits.view(torch.float8_e4m3fn), requires_grad=False), scales


class ExactModule(nn.Module):
    """A module some of whose tensors keep their dtype when `.to(dtype)` changes the others'."""

    def exact_tensors(self) -> Iterable[str]:
        """Attribute names of these tensors."""
        return ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name).detach() for name in self.exact_tensors()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != exact.dtype:
                tensor.data = exact.to(tensor.device)
        return self


class Linear(ExactModule):
    """x @ weight^T. The weight is high precision or, for inference, FP8 with scales of 128 x 128 blocks; `compute` is
    the strategy for using it (`compute.py`)."""

    weight_scale_inv: Tensor | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = unset_parameter(outputs, inputs)
        self.compute: LinearCompute = HighPrecisionLinear()
        self.register_buffer("weight_scale_inv", None)

    def store_fp8(self) -> None:
        """Replaces the weight by an unset FP8 weight and scales, to be loaded."""
        self.weight, self.weight_scale_inv = unset_fp8(self.weight)
        self.compute = Fp8StoredLinear()

    def exact_tensors(self) -> Iterable[str]:
        return () if self.weight_scale_inv is None else ("weight", "weight_scale_inv")

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight converted to `dtype`, dequantized if it is FP8."""
        if self.weight_scale_inv is None:
            return self.weight.to(dtype)
        return dequantize(self.weight, self.weight_scale_inv, (BLOCK, BLOCK), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.weight_scale_inv)


def linear_outputs(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """The outputs of several layers of one input. In FP8 training they quantize and save it once."""
    trained = [(layer.compute, layer.weight) for layer in layers if isinstance(layer.compute, Fp8TrainedLinear)]
    if len(trained) == len(layers):
        return Fp8TrainedLinear.several(x, trained)
    return tuple(layer(x) for layer in layers)


class Embedding(nn.Module):
    """Rows of a table by id, in the table's dtype or in `dtype`. All layers compute in the dtype of this output.

    in_place: the backward adds to the table's gradient itself (`kernels/embedding.py`).
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = unset_parameter(rows, width)
        self.dtype: torch.dtype | None = None
        self.in_place = False

    def forward(self, ids: Tensor) -> Tensor:
        rows = embedding(ids, self.weight) if self.in_place else F.embedding(ids, self.weight)
        return rows.to(self.dtype or self.weight.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalization of the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = unset_parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)
