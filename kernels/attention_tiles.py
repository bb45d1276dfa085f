"""Tile shapes and Triton helpers shared by the forward and the backward of attention.

A query head of 192 elements is read as 128 and 64, both powers of two, instead of as 256 with a quarter of zeros.

Shapes: B rows, T tokens, H heads, A elements of a query or key head, V elements of a value head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.util.backend import INTERPRETED, row_offset


@dataclass(frozen=True)
class TileShape:
    """Queries and keys per iteration of a CTA, its warps, and the stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class KernelBlocks:
    """The blocks of the three kernels: the output, the gradient of queries, that of keys and values."""

    forward: TileShape
    queries: TileShape
    keys: TileShape


@dataclass(frozen=True)
class AttentionSizes:
    """Compile-time sizes of a kernel: query heads of A elements, read in parts of A0 and A1 (0 if one part is enough),
    value heads of V, read as V0; BQ queries and BK keys per iteration."""

    A: int | tl.constexpr
    A0: int | tl.constexpr
    A1: int | tl.constexpr
    V: int | tl.constexpr
    V0: int | tl.constexpr
    BQ: int | tl.constexpr
    BK: int | tl.constexpr


# Three stages where they fit: with two, an iteration's rows are loaded only when the previous one is almost done.
_HALF = KernelBlocks(TileShape(128, 64, 8, 3), TileShape(128, 64, 8, 3), TileShape(32, 128, 8, 3))
_HALF_WIDE = KernelBlocks(TileShape(64, 32, 4, 2), TileShape(64, 32, 8, 2), TileShape(32, 64, 8, 2))
# FP32 products run on the CUDA cores, with both factors in registers.
_FULL = KernelBlocks(TileShape(32, 16, 8, 1), TileShape(16, 16, 8, 1), TileShape(32, 32, 8, 1))


@triton.jit
def dot(a, b, c):
    """Returns a b + c in FP32; FP32 factors keep all their bits. (The interpreter of Triton 3.6 and 3.7 multiplies the
    bit patterns of BF16 numbers.)"""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def head_start(ptr, row, head, strides):
    """Pointer to the matrix [T, elements] of one row's head."""
    return ptr + row_offset(row, strides[0]) + row_offset(head, strides[2])


@triton.jit
def load_tile(
    ptr, row, limit, stride, AT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Loads ROWS rows from `row` and COLUMNS columns from AT of a limit x WIDTH matrix; zeros outside."""
    rows, columns = tl.arange(0, ROWS), AT + tl.arange(0, COLUMNS)
    inside = (row + rows < limit)[:, None]
    if AT + COLUMNS > WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    at = ptr + row_offset(row, stride) + (rows[:, None] * stride + columns[None, :])
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, x, row, limit, stride, AT: tl.constexpr, WIDTH: tl.constexpr):
    """Rounds x to the matrix's dtype and stores it where `load_tile` would read it."""
    rows, columns = tl.arange(0, x.shape[0]), AT + tl.arange(0, x.shape[1])
    inside = (row + rows < limit)[:, None] & (columns < WIDTH)[None, :]
    at = ptr + row_offset(row, stride) + (rows[:, None] * stride + columns[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_parts(ptr, row, limit, stride, S: tl.constexpr, ROWS: tl.constexpr):
    """Loads ROWS rows of a matrix of width A, in one or two parts (the second is the first if one part is enough)."""
    first = load_tile(ptr, row, limit, stride, 0, S.A, ROWS, S.A0)
    second = first
    if S.A1 > 0:
        second = load_tile(ptr, row, limit, stride, S.A0, S.A, ROWS, S.A1)
    return first, second


@triton.jit
def dot_parts(a0, a1, b0, b1, S: tl.constexpr):
    """Returns a b^T, of rows in parts."""
    scores = dot(a0, b0.T, tl.zeros((a0.shape[0], b0.shape[0]), dtype=tl.float32))
    if S.A1 > 0:
        scores = dot(a1, b1.T, scores)
    return scores


@triton.jit
def key_range(start_ptr, query, T, PART: tl.constexpr, S: tl.constexpr):
    """Range [begin, end) of keys for BQ queries. Part 1 is visible to all of them; parts 0 and 2 are the edges."""
    last = tl.minimum(query + S.BQ, T)
    first = tl.load(start_ptr + query)
    outer = first + (query - first) // S.BK * S.BK
    inner = tl.minimum(first + tl.cdiv(tl.load(start_ptr + last - 1) - first, S.BK) * S.BK, outer)
    if PART == 0:
        return first, inner
    elif PART == 1:
        return inner, outer
    else:
        return outer, last


@triton.jit
def is_visible(queries, keys, starts):
    """Whether a query attends to a key. The arrays broadcast; `starts` belong to the queries."""
    return (keys <= queries) & (keys >= starts)


def _widths(width: int) -> tuple[int, int]:
    """Powers of two, at least 16, in which a head is read: one that covers it, or two with fewer elements in total."""
    one = max(triton.next_power_of_2(width), 16)
    first = one // 2
    second = max(triton.next_power_of_2(width - first), 16) if width > first else 0
    return (first, second) if 0 < second < first else (one, 0)


def _covers(q_BTHA: Tensor, v_BTHV: Tensor) -> tuple[int, int, int]:
    """Widths in which heads are read: (a query's first part, its second, a value)."""
    return (*_widths(q_BTHA.shape[-1]), max(triton.next_power_of_2(v_BTHV.shape[-1]), 16))


def default_blocks(q_BTHA: Tensor, v_BTHV: Tensor) -> KernelBlocks:
    """The blocks for heads of these widths and dtype."""
    if q_BTHA.dtype == torch.float32:
        return _FULL
    return _HALF if sum(_covers(q_BTHA, v_BTHV)) <= 320 else _HALF_WIDE


def compile_options(q_BTHA: Tensor, v_BTHV: Tensor, tile: TileShape) -> dict[str, Any]:
    """A kernel's last argument, its compile-time sizes, and Triton's options."""
    first, second, value = _covers(q_BTHA, v_BTHV)
    sizes = (q_BTHA.shape[-1], first, second, v_BTHV.shape[-1], value, tile.queries, tile.keys)
    # Triton's compiler requires constants where its interpreter requires plain numbers.
    constant = int if INTERPRETED.value else tl.constexpr
    return {"S": AttentionSizes(*map(constant, sizes)), "num_warps": tile.warps, "num_stages": tile.stages}
