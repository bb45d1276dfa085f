"""Dispatch into other ranks' memory: quantizes, permutes and writes tokens to their receivers in one pass.

An inbox is memory of another rank that this process, or this GPU, can write: shared memory on one host, or symmetric
memory over NVLink. A token is written once into the inbox of every rank that has any of its experts, in token order.
Each row is packed as in `wire.py` and followed by its metadata: bytes that are sent unchanged. Separate operations
would write the same bytes four times: for packing, concatenation, permutation and transfer.

The Triton kernel has one CTA per token, which reads the token once and writes it to each inbox by address. A prefix sum
computes the places in advance.

Shapes: T tokens, D columns, P ranks, C places of an inbox, W bytes of a packed row, N bytes of metadata.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.quantize import scaled_e4m3, tile_scales
from moray.kernels.rows_cpu import compiles, push_rows_compiled
from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import backend, magnitude_bits, row_offset
from moray.kernels.wire import pack_rows_reference, packed_width


def _check(rows_TD: Tensor, metadata_TN: Tensor, sent_PT: Tensor, inboxes: Sequence[Tensor]) -> None:
    """Checks shapes and dtypes. Whether an inbox has enough places is not checked: that would wait for a device."""
    check_tensor("rows_TD", rows_TD, (None, None), FLOAT_DTYPES)
    check_tensor("metadata_TN", metadata_TN, (len(rows_TD), None), (torch.uint8,), like=rows_TD)
    check_tensor("sent_PT", sent_PT, (len(inboxes), len(rows_TD)), (torch.bool,), like=rows_TD)
    width = packed_width(rows_TD.shape[1]) + metadata_TN.shape[1]
    for number, inbox in enumerate(inboxes):
        check_tensor(f"inboxes[{number}]", inbox, (None, width), (torch.uint8,), like=rows_TD)


def push_rows_reference(rows_TD: Tensor, metadata_TN: Tensor, sent_PT: Tensor, inboxes: Sequence[Tensor]) -> None:
    """`push_rows` in PyTorch, by separate operations."""
    packed_TX = torch.cat((pack_rows_reference(rows_TD), metadata_TN), dim=1)
    for sent_T, inbox in zip(sent_PT, inboxes, strict=True):
        copies = packed_TX.index_select(0, sent_T.nonzero().squeeze(1))
        inbox[: len(copies)] = copies


@triton.jit
def _push(
    rows_ptr, metadata_ptr, places_ptr, addresses_ptr, D, T, N, P, width, TILES: tl.constexpr, BYTES: tl.constexpr
):
    """Writes one token: TILES x 128 numbers, and BYTES of metadata."""
    token = tl.program_id(0)
    tiles, columns, octets = tl.arange(0, TILES), tl.arange(0, 128), tl.arange(0, BYTES)
    at = tiles[:, None] * 128 + columns[None, :]
    x = tl.load(rows_ptr + row_offset(token, D) + at, mask=at < D, other=0.0).to(tl.float32)
    scales = tile_scales(tl.max(magnitude_bits(x), axis=1, keep_dims=True), True)
    fp8 = scaled_e4m3(x, scales, True).to(tl.uint8, bitcast=True)
    exponents = ((scales.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
    metadata = tl.load(metadata_ptr + row_offset(token, N) + octets, mask=octets < N, other=0)
    packed = D + tl.cdiv(D, 128)
    for rank in range(P):
        where = tl.load(places_ptr + row_offset(rank, T) + token)
        if where >= 0:
            inbox = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.uint8)) + row_offset(where, width)
            tl.store(inbox + at, fp8, mask=at < D)
            tl.store(inbox + D + tiles[:, None], exponents, mask=tiles[:, None] * 128 < D)
            tl.store(inbox + packed + octets, metadata, mask=octets < N)


def push_rows_triton(rows_TD: Tensor, metadata_TN: Tensor, sent_PT: Tensor, inboxes: Sequence[Tensor]) -> None:
    """Writes the reference's bytes, except for the encoding of NaN."""
    tokens, columns = rows_TD.shape
    if not tokens:
        return
    places_PT = torch.where(sent_PT, sent_PT.cumsum(1) - 1, -1)
    addresses_P = torch.tensor([inbox.data_ptr() for inbox in inboxes], dtype=torch.int64, device=rows_TD.device)
    tiles, size = triton.next_power_of_2(-(-columns // 128)), metadata_TN.shape[1]
    _push[(tokens,)](
        rows_TD, metadata_TN, places_PT, addresses_P, columns, tokens, size, len(inboxes), inboxes[0].shape[1],
        TILES=tiles, BYTES=triton.next_power_of_2(max(size, 1)), num_warps=8 if tiles >= 16 else 4,
    )  # fmt: skip


def push_rows(rows_TD: Tensor, metadata_TN: Tensor, sent_PT: Tensor, inboxes: Sequence[Tensor]) -> None:
    """Writes each token and its metadata into the inbox of every rank p for which `sent_PT[p]` is true.

    metadata_TN: uint8. sent_PT: bool. inboxes: uint8 [C, W + N], one per rank, contiguous, with at least as many places
    as rows are sent to it. The receiver gets the number of rows, and the signal that they are complete, separately.
    """
    rows_TD, metadata_TN, sent_PT = rows_TD.contiguous(), metadata_TN.contiguous(), sent_PT.contiguous()
    _check(rows_TD, metadata_TN, sent_PT, inboxes)
    if backend(rows_TD) == "triton":
        push_rows_triton(rows_TD, metadata_TN, sent_PT, inboxes)
    elif compiles(rows_TD):
        push_rows_compiled(rows_TD, metadata_TN, sent_PT, inboxes)
    else:
        push_rows_reference(rows_TD, metadata_TN, sent_PT, inboxes)
