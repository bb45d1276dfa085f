"""AdamW whose two moments are FP8: 6.125 bytes of state per parameter, including the FP32 master, instead of 12.

A moment is stored in blocks of 128 consecutive elements. The numbers of a block span a far smaller range than E4M3
(first moment) or a far larger one (second moment). So each block has a power in addition to its scale (Xi et al. 2024,
"COAT", §3.1: dynamic range expansion):

    stored = E4M3(sign(x) * |x / largest|^power * 448),   power = log(448 / 2^-6) / log(largest / smallest)

This maps the range from the block's smallest non-zero to its largest number onto E4M3's normal numbers. (COAT maps down
to 2^-9, where a single bit of mantissa is left; the mean error is then twice as large.) Decoding divides the relative
error of the three mantissa bits by the power. If the block's range is larger than E4M3's, the power is below 1, and
small numbers do not become zero. That matters for the second moment, because a zero in it makes its parameter's step
explode.

Notable: the power is clamped to [1/4, 8]. Below, a few bits would have to cover the whole range; above, FP32's own
rounding of the power would dominate. Blocks of zeros have scale 0. A block with a non-finite number decodes to NaN.
Masters are FP32, in which a typical update is thousands of units in the last place, so it needs no stochastic rounding;
BF16 masters would.

The Triton implementation is one kernel. A CTA decodes some blocks, updates their masters and encodes the moments again.
Its floor is its traffic of 16.25 bytes per parameter: gradient 4 (FP32), master 4 + 4, moments 2 * (1 + 1), scales and
powers 2 * (8 + 8) / 128. It computes x^p as 2^(p log2 x), which is less precise than torch's pow: with p up to 4 and
log2 x down to -18, a decoded moment is within 2e-5 of the reference's, less than a thousandth of FP8's error. A number
that this moves across the boundary between two E4M3 numbers is stored as the adjacent one.

Shapes: N elements, flat; J = ceil(N / 128) blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.quantize import BLOCK, E4M3_MAX
from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import INTERPRETED, backend, contiguous_blocks, magnitude_bits, row_offset, to_e4m3

_SMALLEST = 2.0**-6  # of E4M3's normal numbers
_SPAN = torch.log2(torch.tensor(E4M3_MAX / _SMALLEST)).item()
POWERS = (0.25, 8.0)
_SPAN_BITS = tl.constexpr(_SPAN)
_POWER_MIN, _POWER_MAX = tl.constexpr(POWERS[0]), tl.constexpr(POWERS[1])
_PER_PROGRAM = 16  # blocks per CTA
_SLICE = 1 << 17  # numbers the reference processes at a time, so that intermediate results stay in a CPU's cache


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
    """Encodes a flat FP32 tensor in FP8. Without `expand`, uses plain E4M3 with a scale per block, for comparison."""
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
    """Decodes a moment to FP32. [N]."""
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
    """Takes one step, number `step` from 1, in place: master and both moments (Loshchilov & Hutter 2019, algorithm 2).

    The step uses the FP32 moments, before they are rounded.
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


@triton.jit
def _log2(x):
    """Computes log2 with the GPU's approximate instruction. Its error is 2^-22 of the logarithm, and it costs a
    twentieth of the accurate version, which each parameter would need four times."""
    if INTERPRETED:
        return tl.math.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _signed(magnitude, x):
    """Returns the magnitude with x's sign, including the sign of zero."""
    bits = magnitude.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _restore(fp8, scales, powers):
    """Decodes E4M3 numbers to FP32 [ROWS, 128]."""
    stored = fp8.to(tl.float32)
    log = _log2(tl.abs(stored) * (1.0 / 448.0))  # -inf for 0, for which exp2 returns 0
    magnitude = tl.math.exp2(log * tl.math.div_rn(1.0, powers)[:, None])
    return _signed(magnitude, stored) * scales[:, None]


@triton.jit
def _compress(x, EXPAND: tl.constexpr):
    """Encodes blocks [ROWS, 128]: (E4M3 numbers, scales, powers)."""
    bits = magnitude_bits(x)
    largest_bits = tl.max(bits, axis=1)
    largest = largest_bits.to(tl.float32, bitcast=True)
    # Multiplies by one inverse per block. 2^64 keeps the inverse of a tiny largest number finite.
    lift = tl.where(largest < 5.421010862427522e-20, 18446744073709551616.0, 1.0)
    inverse = tl.where(largest > 0, tl.math.div_rn(1.0, largest * lift), 0.0)
    quotient = (tl.abs(x) * lift[:, None]) * inverse[:, None]
    powers = tl.full(largest.shape, 1.0, tl.float32)
    if EXPAND:
        smallest = tl.min(tl.where(bits > 0, bits, 0x7F800000), axis=1).to(tl.float32, bitcast=True)
        # abs: the logarithms of adjacent numbers may differ by less than 0. For zeros the span is infinite.
        span = tl.abs(tl.math.log2(largest) - tl.math.log2(smallest))
        wanted = tl.math.div_rn(_SPAN_BITS, span)
        powers = tl.where(wanted == wanted, tl.minimum(tl.maximum(wanted, _POWER_MIN), _POWER_MAX), 1.0)
        quotient = tl.math.exp2(_log2(quotient) * powers[:, None])
    finite = largest_bits < 0x7F800000
    # At most 448 if the block is finite; the numbers of a non-finite block are never read.
    stored = tl.where(finite[:, None], tl.minimum(quotient * 448.0, 448.0), 0.0)
    return to_e4m3(_signed(stored, x)), tl.where(finite, largest, float("nan")), powers


@triton.jit
def _step(
    master_ptr, grad_ptr, first_ptr, first_scale_ptr, first_power_ptr, second_ptr, second_scale_ptr, second_power_ptr,
    N, J, new1, keep2, new2, decay, rate, correction, epsilon,
    ROWS: tl.constexpr, EXPAND: tl.constexpr,
):  # fmt: skip
    """Updates ROWS blocks. new1, keep2, new2: 1 - beta1, beta2, 1 - beta2; rate and correction include the bias
    correction of the moments."""
    blocks = row_offset(tl.program_id(0), ROWS) + tl.arange(0, ROWS)
    at = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    in_blocks, inside = blocks < J, at < N
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scales = tl.load(first_scale_ptr + blocks, mask=in_blocks, other=0.0)
    powers = tl.load(first_power_ptr + blocks, mask=in_blocks, other=1.0)
    m = _restore(tl.load(first_ptr + at, mask=inside, other=0.0), scales, powers)
    m += (grad - m) * new1
    scales = tl.load(second_scale_ptr + blocks, mask=in_blocks, other=0.0)
    powers = tl.load(second_power_ptr + blocks, mask=in_blocks, other=1.0)
    v = _restore(tl.load(second_ptr + at, mask=inside, other=0.0), scales, powers) * keep2 + new2 * grad * grad
    master = tl.load(master_ptr + at, mask=inside, other=0.0)
    master = master * decay - rate * m / (tl.math.sqrt_rn(v * correction) + epsilon)
    tl.store(master_ptr + at, master, mask=inside)
    fp8, scales, powers = _compress(m, EXPAND)
    tl.store(first_ptr + at, fp8, mask=inside)
    tl.store(first_scale_ptr + blocks, scales, mask=in_blocks)
    tl.store(first_power_ptr + blocks, powers, mask=in_blocks)
    fp8, scales, powers = _compress(v, EXPAND)
    tl.store(second_ptr + at, fp8, mask=inside)
    tl.store(second_scale_ptr + blocks, scales, mask=in_blocks)
    tl.store(second_power_ptr + blocks, powers, mask=in_blocks)


@torch.no_grad()
def adamw_fp8_triton(
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
    """Runs the Triton kernel; the step is within 2e-5 of the reference's, and stored numbers are equal but for rare
    neighbours.

    `master_N` FP32, `grad_N` FP32, BF16 or FP16, all contiguous. Raises ValueError for invalid arguments.
    """
    check_tensor("master_N", master_N, (None,), (torch.float32,))
    count = len(master_N)
    blocks = contiguous_blocks(count, BLOCK)
    check_tensor("grad_N", grad_N, (count,), FLOAT_DTYPES, like=master_N)
    for name, moment in (("first", first), ("second", second)):
        check_tensor(f"{name}.fp8_N", moment.fp8_N, (count,), (torch.float8_e4m3fn,), like=master_N)
        check_tensor(f"{name}.scales_J", moment.scales_J, (blocks,), (torch.float32,), like=master_N)
        check_tensor(f"{name}.powers_J", moment.powers_J, (blocks,), (torch.float32,), like=master_N)
    if count:
        _step[(triton.cdiv(blocks, _PER_PROGRAM),)](
            master_N, grad_N, first.fp8_N, first.scales_J, first.powers_J, second.fp8_N, second.scales_J,
            second.powers_J, count, blocks, 1 - beta1, beta2, 1 - beta2, 1 - rate * weight_decay,
            rate / (1 - beta1**step), 1 / (1 - beta2**step), epsilon,
            ROWS=_PER_PROGRAM, EXPAND=expand, num_warps=4,
        )  # fmt: skip


def adamw_fp8(
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
    """Takes one step, number `step` from 1, in place: master and both moments (Loshchilov & Hutter 2019, algorithm 2).

    The step uses the FP32 moments, before they are rounded.
    """
    numbers: dict[str, Any] = {
        "step": step, "rate": rate, "beta1": beta1, "beta2": beta2, "epsilon": epsilon,
        "weight_decay": weight_decay, "expand": expand,
    }  # fmt: skip
    in_float64 = torch.float64 in (master_N.dtype, grad_N.dtype)
    if not in_float64 and backend(master_N) == "triton":
        adamw_fp8_triton(master_N, grad_N.contiguous(), first, second, **numbers)
        return
    for start in range(0, len(master_N), _SLICE):
        part, blocks = slice(start, start + _SLICE), slice(start // BLOCK, (start + _SLICE) // BLOCK)
        moments = [Fp8Moment(m.fp8_N[part], m.scales_J[blocks], m.powers_J[blocks]) for m in (first, second)]
        adamw_fp8_reference(master_N[part], grad_N[part], *moments, **numbers)


compress = compress_reference
restore = restore_reference
