"""The error of FP8 products: accumulation with ~14 bits, and the storage format of a layer's input.

The first table measures a product over K = 4096 with and without promotion every 128 elements (DeepSeek-V3 §3.3.2).
Hopper's FP8 tensor cores sum the 32 products of an instruction and the accumulator as follows. They align all addends
to the largest exponent, cut off bits more than 13 below it, and sum the rest exactly. This script does the same in
float64, once with one accumulator over all of K and once with partial sums over 128 elements that are added in FP32. It
compares both with the exact product of the same E4M3 numbers.

The second table multiplies a gradient in FP8 by a stored input and compares the result with the weight gradient from
the input in float64. The forward pass stores the input as E4M3 rows that the backward pass transposes, as E5M6 rows, or
as E4M3 quantized along the tokens. An input stored in BF16, which attention's backward needs anyway, is quantized along
the tokens in the backward pass. Its result equals the third one by construction, so it has no row in the table.

Usage: python benchmarks/fp8_accuracy.py
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from harness.result import Bar, report
from torch import Tensor

from moray.kernels.quantize import COLUMN_TILES, ROW_TILES, dequantize, quantize

ROWS, COLUMNS, K = 64, 64, 4096
INSTRUCTION = 32  # elements of K summed by one instruction
PROMOTION = 128
FRACTION_BITS = 13


def cut(addends: Tensor) -> Tensor:
    """Sums the last axis as the tensor cores do: aligned to the largest exponent, truncated toward zero."""
    _, exponents = torch.frexp(addends)
    largest = torch.where(addends != 0, exponents, -1000).amax(-1, keepdim=True)
    grid = torch.ldexp(torch.ones_like(addends[..., :1]), largest - 1 - FRACTION_BITS)
    return ((addends / grid).trunc() * grid).sum(-1)


def tensor_core(a_MK: Tensor, b_NK: Tensor, promotion: int | None) -> Tensor:
    """a @ b^T with a low-precision accumulator, which is added to an FP32 sum every `promotion` elements if set."""
    accumulator = torch.zeros(len(a_MK), len(b_NK), dtype=torch.float64)
    total = torch.zeros(len(a_MK), len(b_NK), dtype=torch.float32)
    for begin in range(0, a_MK.shape[1], INSTRUCTION):
        part = slice(begin, begin + INSTRUCTION)
        products = a_MK[:, None, part] * b_NK[None, :, part]
        accumulator = cut(torch.cat((products, accumulator.unsqueeze(-1)), dim=-1))
        if promotion and (begin + INSTRUCTION) % promotion == 0:
            total += accumulator.float()
            accumulator.zero_()
    return total.double() + accumulator


def e4m3(x: Tensor) -> Tensor:
    """x scaled and rounded to E4M3, in float64. One scale for all of x is enough here, and it is dropped."""
    return quantize(x.reshape(1, -1), (1, x.numel()))[0].view_as(x).double()


def round_trip(x: Tensor, tiles: tuple[int, int]) -> Tensor:
    """x quantized to E4M3 and dequantized."""
    return dequantize(*quantize(x, tiles, power_of_two=True), tiles)


def e5m6(x: Tensor) -> Tensor:
    """x rounded to a six-bit mantissa (to nearest, ties to even), in FP32."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF).view(torch.float32)


def kept_inputs(generator: torch.Generator) -> list[dict[str, Any]]:
    """Weight-gradient error by the format of the stored input. Magnitudes differ between rows, as in attention."""
    tokens, width = 4096, 512
    sizes = torch.exp(2 * torch.randn(tokens, 1, generator=generator))
    x_TK = (torch.randn(tokens, width, generator=generator) * sizes).bfloat16().float()
    dy_TN = round_trip(torch.randn(tokens, 256, generator=generator), COLUMN_TILES).double()
    kept = {
        "E4M3 rows, transposed": round_trip(round_trip(x_TK, ROW_TILES), COLUMN_TILES),
        "E5M6 rows, transposed": round_trip(e5m6(x_TK), COLUMN_TILES),
        "E4M3 along the tokens": round_trip(x_TK, COLUMN_TILES),
    }
    exact = dy_TN.t() @ x_TK.double()
    return [
        {"kept": name, "gradient_error_%": ((dy_TN.t() @ x.double() - exact).norm() / exact.norm()).item() * 100}
        for name, x in kept.items()
    ]


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    bars = []
    for name, draw in (("normal", torch.randn), ("uniform 0..1", torch.rand)):
        a_MK = e4m3(draw(ROWS, K, generator=generator))
        b_NK = e4m3(draw(COLUMNS, K, generator=generator))
        exact = a_MK @ b_NK.t()
        size = exact.square().mean().sqrt()
        errors = {}
        for how, promotion in (("one accumulator", None), (f"promoted every {PROMOTION}", PROMOTION)):
            error = tensor_core(a_MK, b_NK, promotion) - exact
            errors[how] = (error.square().mean().sqrt() / size).item()
            worst = (error.abs().max() / size).item()
            rows.append({"inputs": name, "sum": how, "rms_error_%": errors[how] * 100, "max_error_%": worst * 100})
        plain, promoted = errors.values()
        bars.append(Bar(f"{name}: error without promotion over error with", plain / promoted, 10.0, "higher"))
    rows += kept_inputs(generator)
    return report("fp8_accuracy", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
