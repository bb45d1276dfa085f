"""Measures tile shapes of the FP8 products on the available GPU, and writes the table that the kernels read.

`kernels/tuned/DEVICE.json` holds, for each product and size, the fastest shape with a correct result and its measured
speed, and the time of experts' weight gradients in FP8 and BF16. It also records the command and the machine. Nothing
is tuned at run time.

Usage: PYTHONPATH=. python benchmarks/tune_gpu.py          needs torch and triton, not Ray
       TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/tune_gpu.py --small     without a GPU: checks a few shapes
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.gpu_cases import SMALL, V3, Sizes, near, offsets_of
from harness.result import machine
from kernels_gpu import Clock, has_gpu
from torch import Tensor

from moray.kernels import fp8_gemm, quantize
from moray.kernels.fp8_experts import Factor, stack_gradient_bf16, stack_gradient_fp8
from moray.kernels.quantize import ROW_TILES, WEIGHT_BLOCKS
from moray.kernels.tuning import Tiles, table_file


@dataclass(frozen=True)
class Product:
    """One kernel at one size: a function that runs it with a tile shape, its expected result, and its tile widths."""

    kernel: str
    size: tuple[int, int, int]
    run: Callable[..., Tensor]
    expected: Callable[[], Tensor]
    columns: tuple[int, ...]


def candidates(product: Product) -> Iterator[Tiles]:
    for rows, columns, warps, stages in itertools.product((64, 128), product.columns, (4, 8), (3, 4, 5, 6)):
        yield Tiles(rows, columns, warps, stages)


def products(size: Sizes, device: str) -> Iterator[Product]:
    """The products of V3's linear layers, plain and grouped."""
    for n, k in ((size.inner, size.hidden), (size.hidden, size.inner), (2 * size.inner, size.hidden)):
        weight = torch.randn(size.experts, n, k, device=device, dtype=torch.bfloat16) / k**0.5
        w = quantize.quantize(weight, WEIGHT_BLOCKS, True)
        for m in size.tokens:
            x = quantize.quantize(torch.randn(m, k, device=device, dtype=torch.bfloat16), ROW_TILES, True)
            one = (w[0][0], w[1][0])
            yield Product(
                "fp8_gemm",
                (m, n, k),
                partial(fp8_gemm.fp8_gemm_triton, *x, *one),
                partial(fp8_gemm.fp8_gemm_reference, *x, *one, dtype=torch.float32),
                (64, 128),
            )
        offsets = offsets_of(size, False, device)
        wide = torch.randn(size.rows, k, device=device, dtype=torch.bfloat16)
        rowwise, transposed = quantize.quantize_both(wide, True)
        yield Product(
            "fp8_gemm_grouped",
            (size.rows, n, k),
            partial(fp8_gemm.fp8_gemm_grouped_triton, *rowwise, *w, offsets),
            partial(fp8_gemm.fp8_gemm_grouped_reference, *rowwise, *w, offsets, dtype=torch.float32),
            (64, 128),
        )
        other = quantize.quantize_both(torch.randn(size.rows, n, device=device, dtype=torch.bfloat16), True)[1]
        yield Product(
            "fp8_gemm_k_grouped",
            (n, k, size.rows),
            partial(fp8_gemm.fp8_gemm_k_grouped_triton, *other, *transposed, offsets),
            partial(fp8_gemm.fp8_gemm_k_grouped_reference, *other, *transposed, offsets),
            (64, 128, 256),
        )


def weight_gradients(size: Sizes, device: str) -> dict[str, Callable[[], Any]]:
    """The weight gradients of a layer's experts, in either precision, from what the backward has: rows and gradients as
    they arrive, and the outputs of SwiGLU's backward."""
    offsets = offsets_of(size, False, device)

    def factor(columns: int, is_transposed: bool) -> Factor:
        wide = torch.randn(size.rows, columns, device=device, dtype=torch.bfloat16)
        return Factor(*quantize.quantize_both(wide, True)[is_transposed], is_transposed)

    x, dy = factor(size.hidden, False), factor(size.hidden, False)
    d_gate_up, inner = factor(2 * size.inner, True), factor(size.inner, True)
    return {
        name: lambda form=form: (form(d_gate_up, x, offsets), form(dy, inner, offsets))
        for name, form in (("fp8", stack_gradient_fp8), ("bf16", stack_gradient_bf16))
    }


def check_gradients(forms: dict[str, Callable[[], Any]]) -> None:
    """Raises AssertionError if the two precisions disagree by more than a rounding to BF16, and FP8's second one."""
    for found, expected in zip(forms["bf16"](), forms["fp8"](), strict=True):
        assert (found.float() - expected).norm() < 2.0**-6 * expected.norm()


def best_of(product: Product, clock: Clock) -> dict[str, Any]:
    """The fastest shape. Skips a shape that exceeds the device's resources; raises AssertionError on a wrong result."""
    expected, measured = product.expected(), {}
    for shape in candidates(product):
        run = partial(product.run, shape=shape)
        try:
            found = run()
        except Exception as error:
            if "out of resource" not in str(error):
                raise
            continue
        near(found, expected, 2.0**-7)
        measured[shape] = clock.milliseconds(run)
    shape = min(measured, key=measured.__getitem__)
    m, n, k = product.size
    row = {"m": m, "n": n, "k": k, **shape.as_dict(), "TFLOPS": round(2 * m * n * k / measured[shape] / 1e9, 1)}
    print(product.kernel, row, f"default {measured.get(Tiles(), float('nan')) / measured[shape]:.2f}x", flush=True)
    return row


def check_small() -> int:
    for product in products(SMALL, "cpu"):
        expected = product.expected()
        for shape in (Tiles(64, 64), Tiles(), Tiles(128, product.columns[-1])):
            near(product.run(shape=shape), expected, 2.0**-7)
        print(f"shapes agree: {product.kernel} {product.size}", flush=True)
    check_gradients(weight_gradients(SMALL, "cpu"))
    print("weight gradients agree: fp8, bf16", flush=True)
    return 0


def main(*arguments: str) -> int:
    if arguments == ("--small",):
        return check_small()
    if not has_gpu("TRITON_INTERPRET=1 python benchmarks/tune_gpu.py --small checks every shape"):
        return 2
    clock = Clock()
    kernels: dict[str, list[dict[str, Any]]] = {}
    for product in products(V3, "cuda"):
        kernels.setdefault(product.kernel, []).append(best_of(product, clock))
    path = table_file(torch.cuda.get_device_name())
    path.parent.mkdir(exist_ok=True)
    content = {"command": "python benchmarks/tune_gpu.py", "machine": machine(), "kernels": kernels}
    path.write_text(json.dumps(content, indent=1) + "\n")  # with its shapes, the gradients are as in training
    forms = weight_gradients(V3, "cuda")
    check_gradients(forms)
    content["weight_gradient_ms"] = {name: round(clock.milliseconds(run), 3) for name, run in forms.items()}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
