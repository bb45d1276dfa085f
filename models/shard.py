"""The expert shard: the experts [e0, e1) of one MoE layer, as one object.

A training rank and a serving actor host the same shard: what was trained is what is served. Weights are stacked over
the experts so that one grouped product serves them all; the logical tensors of single experts are views into the
stack. `load_E` counts the rows that each expert computed, in training and in serving, for placement and metrics.

Shapes: R rows sorted by expert, E experts of the shard, D hidden size, F expert hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moray.kernels.experts import experts as swiglu_experts
from moray.kernels.experts import experts_fp8 as swiglu_experts_fp8
from moray.kernels.fp8_linear import fp8_linear, fp8_swiglu_down
from moray.models.fp8 import Fp8Forms
from moray.models.linear import ExactModule, unset_fp8, unset_parameter
from moray.models.tensors import scale_name

# Attribute of the stack -> Hugging Face's name of the projection.
PROJECTIONS = {"w_gate_EFD": "gate_proj", "w_up_EFD": "up_proj", "w_down_EDF": "down_proj"}


class ExpertShard(ExactModule):
    """Consecutive experts of one layer; `experts` is the range of their ids.

    The weights are wide or, for inference, FP8 with scales of 128 x 128 blocks: those of `w_gate_EFD` are in
    `w_gate_EFD_scale_inv`, and so on. Wide weights may be trained in FP8 (`forms` set).
    """

    load_E: Tensor
    forms: tuple[Fp8Forms, Fp8Forms, Fp8Forms] | None = None

    def __init__(self, experts: range, hidden: int, inner: int) -> None:
        super().__init__()
        self.experts = experts
        self.w_gate_EFD = unset_parameter(len(experts), inner, hidden)
        self.w_up_EFD = unset_parameter(len(experts), inner, hidden)
        self.w_down_EDF = unset_parameter(len(experts), hidden, inner)
        self.register_buffer("load_E", torch.zeros(len(experts), dtype=torch.int64), persistent=False)

    def store_fp8(self) -> None:
        """Makes room for FP8 weights and their scales, to be loaded."""
        for name in PROJECTIONS:
            weight, scales = unset_fp8(getattr(self, name))
            setattr(self, name, weight)
            self.register_buffer(scale_name(name), scales)

    @property
    def is_fp8(self) -> bool:
        return self.w_gate_EFD.dtype == torch.float8_e4m3fn

    def exact_tensors(self) -> Iterable[str]:
        return (*PROJECTIONS, *map(scale_name, PROJECTIONS)) if self.is_fp8 else ()

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """The experts' outputs for rows sorted by local expert, `counts_E` rows each."""
        with torch.no_grad():
            self.load_E += counts_E.to(self.load_E.device)
        if self.is_fp8:
            weights = [(getattr(self, name), getattr(self, scale_name(name))) for name in PROJECTIONS]
            return swiglu_experts_fp8(rows_RD, counts_E, *weights)
        if self.forms is not None:
            return self._trained_in_fp8(rows_RD, counts_E, *self.forms)
        return swiglu_experts(rows_RD, counts_E, self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF)

    def _trained_in_fp8(
        self, rows_RD: Tensor, counts_E: Tensor, gate: Fp8Forms, up: Fp8Forms, down: Fp8Forms
    ) -> Tensor:
        stacks = zip(self.w_gate_EFD.unbind(0), self.w_up_EFD.unbind(0), self.w_down_EDF.unbind(0), strict=True)
        outputs = []
        for index, (x, (w_gate, w_up, w_down)) in enumerate(
            zip(torch.split(rows_RD, counts_E.tolist()), stacks, strict=True)
        ):
            gate_RF = fp8_linear(x, w_gate, gate.of(self.w_gate_EFD, index))
            up_RF = fp8_linear(x, w_up, up.of(self.w_up_EFD, index))
            outputs.append(fp8_swiglu_down(gate_RF, up_RF, w_down, down.of(self.w_down_EDF, index)))
        return torch.cat(outputs)
