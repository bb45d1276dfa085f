"""Root-mean-square normalization: y = x / sqrt(mean(x^2) + eps) * weight.

Notable: the statistics are FP32 even for BF16 rows (a BF16 mean of squares is off by up to 1 %), and the normalized row
is rounded to the row's dtype *before* it is multiplied by the weight. DeepSeek-V3 was trained with that order, and
other implementations use it; the opposite order differs in the last BF16 bit.

The Triton kernels read a row once forward, and x and dy once backward, if the row fits into registers (up to 8,192
elements); longer rows are read twice. The forward saves x and one FP32 number per row, 1 / sqrt(mean(x^2) + eps). The
weight's gradient is summed without atomics: a CTA adds up every 264th tile of rows, and the CTAs' sums are added in a
fixed order, so every run gives the same bits.

Shapes: X any leading axes, R rows, D elements of a row, S CTAs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import backend, rounded, row_offset

_MAX_WIDTH = 32768
_WHOLE = 8192  # longest row that the backward holds in registers, in elements
_TILE = 4096  # elements per tile: several short rows, or a part of a long row
_PROGRAMS = 264  # CTAs of the backward: two per SM of an H100. A device-dependent number would change bits.


def _inverse(upcast_XD: Tensor, eps: float) -> Tensor:
    return (upcast_XD * upcast_XD).mean(-1, keepdim=True).add_(eps).rsqrt_()


class _RmsNormReference(torch.autograd.Function):
    """PyTorch's own gradient of the formula reads and writes five times as much."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        upcast_XD = x_XD if x_XD.dtype == torch.float64 else x_XD.float()
        inverse_X1 = _inverse(upcast_XD, eps)
        ctx.save_for_backward(x_XD, weight_D, inverse_X1)
        return (upcast_XD * inverse_X1).to(x_XD.dtype) * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_XD, weight_D, inverse_X1 = ctx.saved_tensors
        size, compute_dtype = x_XD.shape[-1], inverse_X1.dtype
        inverse_R1 = inverse_X1.reshape(-1, 1)
        normal_RD, dy_RD = x_XD.reshape(-1, size) * inverse_R1, dy_XD.reshape(-1, size).to(compute_dtype)
        product_RD = dy_RD * normal_RD
        dot_R1 = (product_RD @ weight_D.to(compute_dtype)).unsqueeze(1).div_(size)
        dx_RD = (dy_RD * weight_D).addcmul_(normal_RD, dot_R1, value=-1).mul_(inverse_R1)
        return dx_RD.to(x_XD.dtype).view(x_XD.shape), product_RD.sum(0).to(weight_D.dtype), None


def rms_norm_reference(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalizes the last axis of `x_XD` (any leading shape); returns the same shape and dtype. Differentiable once."""
    y_XD: Tensor = _RmsNormReference.apply(x_XD, weight_D, eps)  # type: ignore[no-untyped-call]
    return y_XD


@triton.jit
def _normalise(
    x_ptr, weight_ptr, y_ptr, inverse_ptr, R, D, x_stride, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Normalizes ROWS whole rows."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (rows[:, None] < R) & (columns[None, :] < D)
    x = tl.load(x_ptr + row_offset(rows[:, None], x_stride) + columns[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    x32 = x.to(tl.float32)
    inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.sum(x32 * x32, axis=1) / D + eps))
    normal = rounded(x32 * inverse[:, None], x.dtype).to(tl.float32)
    y = rounded(normal * weight[None, :], y_ptr.dtype.element_ty)
    tl.store(y_ptr + row_offset(rows[:, None], D) + columns[None, :], y, mask=inside)
    tl.store(inverse_ptr + rows, inverse, mask=rows < R)


@triton.jit
def _dots(x_ptr, dy_ptr, weight_ptr, inverse_ptr, dot_ptr, D, x_stride, dy_stride, WIDTH: tl.constexpr):
    """Computes mean(dy * weight * x) / sqrt(mean(x^2) + eps) of one long row."""
    row, columns = tl.program_id(0), tl.arange(0, WIDTH)
    inverse = tl.load(inverse_ptr + row)
    products = tl.zeros([WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        inside = start + columns < D
        x = tl.load(x_ptr + row_offset(row, x_stride) + start + columns, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row_offset(row, dy_stride) + start + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        products += (x * inverse) * (dy * weight)
    tl.store(dot_ptr + row, tl.sum(products, axis=0) / D)


@triton.jit
def _gradients(
    x_ptr, dy_ptr, weight_ptr, inverse_ptr, dot_ptr, dx_ptr, partial_ptr, R, D, x_stride, dy_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Processes WIDTH columns of every num_programs-th tile of ROWS rows. Dots are computed for rows that fit, else
    loaded."""
    first, columns = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.range(first, tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=2):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows[:, None] < R) & (columns[None, :] < D)
        x = tl.load(x_ptr + row_offset(rows[:, None], x_stride) + columns[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row_offset(rows[:, None], dy_stride) + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        inverse = tl.load(inverse_ptr + rows, mask=rows < R, other=0.0)[:, None]
        normal = x.to(tl.float32) * inverse
        scaled = dy * weight[None, :]
        if WHOLE:
            dot = tl.sum(normal * scaled, axis=1)[:, None] / D
        else:
            dot = tl.load(dot_ptr + rows, mask=rows < R, other=0.0)[:, None]
        dx = rounded(inverse * (scaled - normal * dot), x.dtype)
        tl.store(dx_ptr + row_offset(rows[:, None], D) + columns[None, :], dx, mask=inside)
        dweight += dy * rounded(normal, x.dtype).to(tl.float32)
    tl.store(partial_ptr + row_offset(first, D) + columns, tl.sum(dweight, axis=0), mask=columns < D)


def _rows(x_XD: Tensor) -> Tensor:
    """Returns [R, D] with contiguous elements: a view if the rows are evenly spaced in memory."""
    flat_RD = x_XD.reshape(x_XD.numel() // x_XD.shape[-1], x_XD.shape[-1])
    return flat_RD if flat_RD.stride(1) == 1 else flat_RD.contiguous()


def _warps(elements: int) -> int:
    return min(max(elements // 1024, 4), 16)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y_XD = torch.empty(x_XD.shape, dtype=torch.promote_types(x_XD.dtype, weight_D.dtype), device=x_XD.device)
        inverse_R = torch.empty(x_XD.shape[:-1].numel(), dtype=torch.float32, device=x_XD.device)
        if x_XD.numel():
            x_RD = _rows(x_XD)
            width = triton.next_power_of_2(x_RD.shape[1])
            rows = max(_TILE // width, 1)
            _normalise[(triton.cdiv(len(x_RD), rows),)](
                x_RD, weight_D, y_XD, inverse_R, *x_RD.shape, x_RD.stride(0), eps,
                ROWS=rows, WIDTH=width, num_warps=_warps(rows * width),
            )  # fmt: skip
        ctx.save_for_backward(x_XD, weight_D, inverse_R)
        return y_XD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_XD, weight_D, inverse_R = ctx.saved_tensors
        if not x_XD.numel():
            return torch.empty_like(x_XD), torch.zeros_like(weight_D), None
        return *_backward(_rows(x_XD), _rows(dy_XD), weight_D, inverse_R, x_XD.shape), None


def _backward(
    x_RD: Tensor, dy_RD: Tensor, weight_D: Tensor, inverse_R: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    count, size = x_RD.shape
    whole = size <= _WHOLE
    width = triton.next_power_of_2(size) if whole else _TILE
    rows = max(_TILE // width, 1)
    strides = (x_RD.stride(0), dy_RD.stride(0))
    dots_R = inverse_R
    if not whole:
        dots_R = torch.empty_like(inverse_R)
        _dots[(count,)](x_RD, dy_RD, weight_D, inverse_R, dots_R, size, *strides, WIDTH=width, num_warps=8)
    programs = min(triton.cdiv(count, rows), _PROGRAMS)
    dx_XD = torch.empty(shape, dtype=x_RD.dtype, device=x_RD.device)
    partial_SD = torch.empty((programs, size), dtype=torch.float32, device=x_RD.device)
    _gradients[(programs, triton.cdiv(size, width))](
        x_RD, dy_RD, weight_D, inverse_R, dots_R, dx_XD, partial_SD, count, size, *strides,
        ROWS=rows, WIDTH=width, WHOLE=whole, num_warps=2 * _warps(rows * width),
    )  # fmt: skip
    return dx_XD, partial_SD.sum(0).to(weight_D.dtype)


def rms_norm_triton(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Equals the reference up to the order of summation. The last axis has stride 1 and at most 32,768 elements.

    x and weight are FP32, BF16 or FP16, not necessarily the same. Differentiable once, in both; the gradients are
    computed in FP32 and rounded once. Raises ValueError for invalid arguments.
    """
    size = x_XD.shape[-1] if x_XD.dim() else 0
    strides = (*(None,) * (x_XD.dim() - 1), 1 if size > 1 else None)
    check_tensor("x_XD", x_XD, (None,) * max(x_XD.dim(), 1), FLOAT_DTYPES, strides=strides)
    check_tensor("weight_D", weight_D, (size,), FLOAT_DTYPES, like=x_XD)
    if size > _MAX_WIDTH:
        raise ValueError(f"x_XD has shape {tuple(x_XD.shape)}, expected at most {_MAX_WIDTH} elements in the last axis")
    y_XD: Tensor = _RmsNorm.apply(x_XD, weight_D, eps)  # type: ignore[no-untyped-call]
    return y_XD


def rms_norm(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalizes the last axis of `x_XD` (any leading shape); returns the same shape and dtype."""
    if torch.float64 in (x_XD.dtype, weight_D.dtype) or backend(x_XD) == "reference":
        return rms_norm_reference(x_XD, weight_D, eps)
    return rms_norm_triton(x_XD if x_XD.stride(-1) == 1 else x_XD.contiguous(), weight_D, eps)
