"""The expert shard: the experts [e0, e1) of one MoE layer, as one module.

Training ranks and serving actors use the same shard, so serving runs the trained module. Weights are stacked over the
experts so that one grouped GEMM covers all of them; the logical tensors of single experts are views into the stack.
`load_E` counts the rows computed by each expert, in training with gradients and in serving, for placement and metrics.

Shapes: R rows, E experts of the shard, D hidden size, F expert hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moray.models.compute import ExpertsCompute, ExpertStacks, Fp8StoredExperts, HighPrecisionExperts
from moray.models.expert_parallel.stages import ExpertRows
from moray.models.linear import ExactModule, unset_fp8, unset_parameter
from moray.models.tensors import scale_name

# Attribute of the stack -> Hugging Face's name of the projection.
PROJECTIONS = {"w_gate_EFD": "gate_proj", "w_up_EFD": "up_proj", "w_down_EDF": "down_proj"}


class ExpertShard(ExactModule):
    """Consecutive experts of one layer; `experts` is the range of their ids.

    The weights are high precision or, for inference, FP8 with scales of 128 x 128 blocks: those of `w_gate_EFD` are in
    `w_gate_EFD_scale_inv`, and so on. `compute` is the strategy for using them (`compute.py`).
    """

    load_E: Tensor

    def __init__(self, experts: range, hidden: int, inner: int) -> None:
        super().__init__()
        self.experts = experts
        self.compute: ExpertsCompute = HighPrecisionExperts()
        self.w_gate_EFD = unset_parameter(len(experts), inner, hidden)
        self.w_up_EFD = unset_parameter(len(experts), inner, hidden)
        self.w_down_EDF = unset_parameter(len(experts), hidden, inner)
        self.register_buffer("load_E", torch.zeros(len(experts), dtype=torch.int64), persistent=False)

    def store_fp8(self) -> None:
        """Replaces the weights by unset FP8 weights and scales, to be loaded."""
        for name in PROJECTIONS:
            weight, scales = unset_fp8(getattr(self, name))
            setattr(self, name, weight)
            self.register_buffer(scale_name(name), scales)
        self.compute = Fp8StoredExperts()

    @property
    def is_fp8(self) -> bool:
        return self.w_gate_EFD.dtype == torch.float8_e4m3fn

    def exact_tensors(self) -> Iterable[str]:
        return (*PROJECTIONS, *map(scale_name, PROJECTIONS)) if self.is_fp8 else ()

    def forward(self, rows: ExpertRows) -> Tensor:
        """The experts' outputs, times the router's weights: [R, D]."""
        if torch.is_grad_enabled() or not self.training:  # else a layer's first run, which the backward repeats
            with torch.no_grad():
                self.load_E += rows.counts_L.to(self.load_E.device, non_blocking=True)  # the counts may be on the host
        stacks = ExpertStacks(self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF)
        scales = ExpertStacks(*(getattr(self, scale_name(name)) for name in PROJECTIONS)) if self.is_fp8 else None
        return self.compute(rows, stacks, scales)
