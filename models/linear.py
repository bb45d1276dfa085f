"""Weight holders: a bias-free linear map, an embedding table, a norm.

Notable: a new weight is filled with NaN. Initialisation and loading are explicit here (`DeepseekV3.init_weights`,
`checkpoint.load`), and a weight that both forgot shows in the first loss instead of training as noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moray.kernels.rms_norm import rms_norm


def unset_parameter(*shape: int) -> nn.Parameter:
    """A parameter of NaNs, to be initialised or loaded."""
    return nn.Parameter(torch.full(shape, float("nan")))


class Linear(nn.Module):
    """x @ weight^T."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = unset_parameter(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of a table by id."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = unset_parameter(rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = unset_parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
