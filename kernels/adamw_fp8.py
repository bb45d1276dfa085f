"""AdamW whose two moments are FP8: 6.125 bytes of state per parameter, with the FP32 master, instead of 12.

A moment is cut into blocks of 128 consecutive elements. Within a block the numbers span far less than E4M3 does (first
moment) or far more (second moment), so each block gets a power besides its scale (Xi et al. 2024, "COAT", §3.1: dynamic
range expansion):

    stored = E4M3(sign(x) * |x / largest|^power * 448),   power = log(448 / 2^-6) / log(largest / smallest)

which spreads the block from its smallest non-zero to its largest number over E4M3's normal numbers (COAT goes down to
2^-9, but there a single bit is left, and the mean error is twice as large). Reading it back divides the relative error
of three bits of mantissa by the power. Where the span is wider than E4M3's, the power is below 1 and small numbers stay
instead of becoming zero. That matters for the second moment: a zero in it makes its parameter's step explode.

Notable: the power is kept within [1/4, 8]: below, a few bits would have to cover everything; above, FP32's own rounding
of the power would show. Blocks of zeros have scale 0. A block with a number that is not finite reads back as NaN.

Shapes: N elements, flat; J = ceil(N / 128) blocks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.quantize import BLOCK, E4M3_MAX

_SMALLEST = 2.0**-6  # of E4M3's normal numbers
_SPAN = torch.log2(torch.tensor(E4M3_MAX / _SMALLEST)).item()
POWERS = (0.25, 8.0)


@dataclass
class Fp8Moment:
    """fp8_N float8_e4m3fn; scales_J and powers_J FP32."""

    fp8_N: Tensor
    scales_J: Tensor
    powers_J: Tensor

    @classmethod
    def zeros(cls, count: int, device: torch.device | str = "cpu") -> "Fp8Moment":
        blocks = -(-count // BLOCK)
        bits = torch.zeros(count, dtype=torch.uint8, device=device)
        return cls(
            bits.view(torch.float8_e4m3fn),
            torch.zeros(blocks, device=device),
            torch.ones(blocks, device=device),
        )

    @property
    def nbytes(self) -> int:
        return self.fp8_N.nbytes + self.scales_J.nbytes + self.powers_J.nbytes


def _blocks(x_N: Tensor) -> Tensor:
    return F.pad(x_N, (0, -len(x_N) % BLOCK)).view(-1, BLOCK)


def compress_reference(x_N: Tensor, expand: bool = True) -> Fp8Moment:
    """The FP8 form of a flat FP32 tensor. Without `expand`, plain E4M3 with a scale per block, for comparison."""
    x_JB = _blocks(x_N.float())
    magnitude_JB = x_JB.abs()
    largest_J1 = magnitude_JB.amax(-1, keepdim=True)
    powers_J1 = torch.ones_like(largest_J1)
    if expand:
        smallest_J1 = torch.where(magnitude_JB > 0, magnitude_JB, float("inf")).amin(-1, keepdim=True)
        span_J1 = largest_J1.log2() - smallest_J1.log2()
        powers_J1 = (_SPAN / span_J1).nan_to_num(1.0, POWERS[1]).clamp(*POWERS)
    safe_J1 = torch.where(largest_J1 > 0, largest_J1, 1.0)
    stored_JB = (magnitude_JB / safe_J1).pow(powers_J1) * E4M3_MAX
    fp8_JB = stored_JB.copysign(x_JB).to(torch.float8_e4m3fn)
    scales_J1 = torch.where(largest_J1.isfinite(), largest_J1, float("nan"))
    return Fp8Moment(fp8_JB.flatten()[: len(x_N)].contiguous(), scales_J1.flatten(), powers_J1.flatten())


def restore_reference(moment: Fp8Moment) -> Tensor:
    """The FP32 numbers behind a moment. [N]."""
    stored_JB = _blocks(moment.fp8_N.float()) / E4M3_MAX
    powers_J1, scales_J1 = moment.powers_J.unsqueeze(-1), moment.scales_J.unsqueeze(-1)
    x_JB = stored_JB.abs().pow(1.0 / powers_J1).copysign(stored_JB) * scales_J1
    return x_JB.flatten()[: len(moment.fp8_N)]


@torch.no_grad()
def adamw_fp8_reference(
    master_N: Tensor,
    grad_N: Tensor,
    first: Fp8Moment,
    second: Fp8Moment,
    *,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    expand: bool = True,
) -> None:
    """One step, number `step` from 1, in place: master and both moments (Loshchilov & Hutter 2019, algorithm 2).

    The step is taken with the FP32 moments, before they are rounded.
    """
    m_N = restore_reference(first).lerp_(grad_N.float(), 1 - beta1)
    v_N = restore_reference(second).mul_(beta2).addcmul_(grad_N.float(), grad_N.float(), value=1 - beta2)
    divisor_N = (v_N / (1 - beta2**step)).sqrt_().add_(epsilon)
    master_N.mul_(1 - rate * weight_decay).addcdiv_(m_N, divisor_N, value=-rate / (1 - beta1**step))
    for moment, fresh_N in ((first, m_N), (second, v_N)):
        made = compress_reference(fresh_N, expand)
        moment.fp8_N.view(torch.uint8).copy_(made.fp8_N.view(torch.uint8))
        moment.scales_J.copy_(made.scales_J)
        moment.powers_J.copy_(made.powers_J)


compress = compress_reference
restore = restore_reference
adamw_fp8 = adamw_fp8_reference
