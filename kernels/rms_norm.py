"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight.

Notable: the statistics are FP32 even for BF16 rows (a BF16 mean of squares is off by up to 1 %), and the
normalised row is rounded to the row's dtype *before* the weight multiplies it. That is the order in which
DeepSeek-V3 was trained and in which its other readers compute; the other order differs in the last BF16 bit.
"""

import torch
from torch import Tensor


def rms_norm_reference(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalises the last axis of `x_XD` (any leading shape); returns the same shape and dtype."""
    wide = x_XD if x_XD.dtype == torch.float64 else x_XD.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x_XD.dtype) * weight_D


rms_norm = rms_norm_reference
