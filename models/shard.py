"""The expert shard: the experts [e0, e1) of one MoE layer, as one object.

A training rank and a serving actor host the same shard: what was trained is what is served. Weights are stacked over
the experts so that one grouped product serves them all; the logical tensors of single experts are views into the
stack. `load_E` counts the rows that each expert computed, in training and in serving, for placement and metrics.

Shapes: R rows sorted by expert, E experts of the shard, D hidden size, F expert hidden size.
"""

import torch
from torch import Tensor, nn

from moray.kernels.experts import experts as swiglu_experts
from moray.models.linear import unset_parameter

# Attribute of the stack -> Hugging Face's name of the projection.
PROJECTIONS = {"w_gate_EFD": "gate_proj", "w_up_EFD": "up_proj", "w_down_EDF": "down_proj"}


class ExpertShard(nn.Module):
    """Consecutive experts of one layer; `experts` is the range of their ids."""

    load_E: Tensor

    def __init__(self, experts: range, hidden: int, inner: int) -> None:
        super().__init__()
        self.experts = experts
        self.w_gate_EFD = unset_parameter(len(experts), inner, hidden)
        self.w_up_EFD = unset_parameter(len(experts), inner, hidden)
        self.w_down_EDF = unset_parameter(len(experts), hidden, inner)
        self.register_buffer("load_E", torch.zeros(len(experts), dtype=torch.int64), persistent=False)

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """The experts' outputs for rows sorted by local expert, `counts_E` rows each."""
        with torch.no_grad():
            self.load_E += counts_E.to(self.load_E.device)
        return swiglu_experts(rows_RD, counts_E, self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF)
