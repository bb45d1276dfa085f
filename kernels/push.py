"""Rows into other ranks' memory: quantised, permuted and written where they will be read, in one pass.

An inbox is memory of a rank that this process, or this GPU, writes: shared memory on one host, symmetric memory over
NVLink. A token's row goes once into the inbox of every rank that has experts of it, in the order of tokens, packed as
`wire.py` does, with a bit for each expert (`pack_bits`) after it. Done by separate operations, the same bytes are
written four times: by the packing, the permutation, the bits' joining and the transfer.

The Triton form has a program for each token, which reads its row once and writes it to each inbox by address; places
come from a prefix sum before it.

Shapes: T tokens, D columns, P ranks, L experts of a rank, C places of an inbox, W bytes of a packed row, B = ceil(L /
8).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.arguments import WIDE_DTYPES, check
from moray.kernels.backend import backend, magnitude_bits, place
from moray.kernels.quantize import scaled_e4m3, tile_scales
from moray.kernels.rows_cpu import compiles, push_rows_compiled
from moray.kernels.wire import pack_bits, pack_rows_reference, packed_width


def _check(rows_TD: Tensor, visited_PTL: Tensor, inboxes: Sequence[Tensor]) -> None:
    """Whether every row finds its place is not asked: that would wait for a device."""
    check("rows_TD", rows_TD, (None, None), WIDE_DTYPES)
    check(
        "visited_PTL",
        visited_PTL,
        (len(inboxes), len(rows_TD), None),
        (torch.uint8,),
        like=rows_TD,
        strides=(None,) * 3,
    )
    width = packed_width(rows_TD.shape[1]) + -(-visited_PTL.shape[2] // 8)
    for number, inbox in enumerate(inboxes):
        check(f"inboxes[{number}]", inbox, (None, width), (torch.uint8,), like=rows_TD)


def push_rows_reference(rows_TD: Tensor, visited_PTL: Tensor, inboxes: Sequence[Tensor]) -> None:
    """In PyTorch, by separate operations."""
    packed_TW = pack_rows_reference(rows_TD)
    for visited_TL, inbox in zip(visited_PTL, inboxes, strict=True):
        source_C = visited_TL.any(-1).nonzero().squeeze(1)
        copies = torch.cat((packed_TW.index_select(0, source_C), pack_bits(visited_TL[source_C])), dim=1)
        inbox[: len(source_C)] = copies


@triton.jit
def _push(
    rows_ptr, visited_ptr, places_ptr, addresses_ptr, D, T, L, P, width,
    TILES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One token: its row in TILES x 128 numbers, its experts of a rank in BYTES x 8 bits."""
    token = tl.program_id(0)
    tiles, columns, bits = tl.arange(0, TILES), tl.arange(0, 128), tl.arange(0, 8)
    at = tiles[:, None] * 128 + columns[None, :]
    x = tl.load(rows_ptr + place(token, D) + at, mask=at < D, other=0.0).to(tl.float32)
    scales = tile_scales(tl.max(magnitude_bits(x), axis=1, keep_dims=True), True)
    fp8 = scaled_e4m3(x, scales, True).to(tl.uint8, bitcast=True)
    exponents = ((scales.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
    packed = D + tl.cdiv(D, 128)
    octets = tl.arange(0, BYTES)
    experts = octets[:, None] * 8 + bits[None, :]
    for rank in range(P):
        pair = place(rank, T) + token
        where = tl.load(places_ptr + pair)
        if where >= 0:
            inbox = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.uint8)) + place(where, width)
            tl.store(inbox + at, fp8, mask=at < D)
            tl.store(inbox + D + tiles[:, None], exponents, mask=tiles[:, None] * 128 < D)
            goes = tl.load(visited_ptr + place(pair, L) + experts, mask=experts < L, other=0).to(tl.int32)
            tl.store(inbox + packed + octets, tl.sum(goes << bits[None, :], axis=1).to(tl.uint8), mask=octets * 8 < L)


def push_rows_triton(rows_TD: Tensor, visited_PTL: Tensor, inboxes: Sequence[Tensor]) -> None:
    """The reference's bytes, but for what stands for NaN."""
    tokens, columns = rows_TD.shape
    ranks, _, local = visited_PTL.shape
    if not tokens:
        return
    visited_PTL = visited_PTL.contiguous()
    goes_PT = visited_PTL.any(-1).bool()
    places_PT = torch.where(goes_PT, goes_PT.cumsum(1) - 1, -1)
    addresses_P = torch.tensor([inbox.data_ptr() for inbox in inboxes], dtype=torch.int64, device=rows_TD.device)
    tiles = triton.next_power_of_2(-(-columns // 128))
    _push[(tokens,)](
        rows_TD, visited_PTL, places_PT, addresses_P, columns, tokens, local, ranks, inboxes[0].shape[1],
        TILES=tiles, BYTES=triton.next_power_of_2(-(-local // 8)), num_warps=8 if tiles >= 16 else 4,
    )  # fmt: skip


def push_rows(rows_TD: Tensor, visited_PTL: Tensor, inboxes: Sequence[Tensor]) -> None:
    """Writes each row into the inbox of every rank p with any 1 in `visited_PTL[p]` for its token.

    inboxes: uint8 [C, W + B], one for each rank, contiguous, of at least as many places as rows go there; whoever reads
    one hears from elsewhere how many these are, and when.
    """
    rows_TD = rows_TD.contiguous()
    _check(rows_TD, visited_PTL, inboxes)
    if backend(rows_TD) == "triton":
        push_rows_triton(rows_TD, visited_PTL, inboxes)
    elif compiles(rows_TD):
        push_rows_compiled(rows_TD, visited_PTL, inboxes)
    else:
        push_rows_reference(rows_TD, visited_PTL, inboxes)
