"""Causal attention for training, over whole sequences or over the documents packed in them.

The Triton implementation (GPUs) follows FlashAttention and does not materialize scores. A block of queries loops over
blocks of keys (`attention_forward.py`), and the backward recomputes the scores (`attention_backward.py`). Documents are
contiguous, so the keys visible to a block of queries are one range, and so are the queries that attend to a block of
keys. The ranges are read on the device, and blocks outside them are skipped.

PyTorch's fused attention (SDPA) is faster on an H100 where it applies: on whole sequences, this kernel has 0.74 of its
speed forward and 0.80 with the backward (docs/kernels.md). So whole sequences go to cuDNN's kernel, which supports
value heads narrower than query heads, as in multi-head latent attention. It is not used where cuDNN lacks the head
sizes, nor with `torch.use_deterministic_algorithms`: this kernel's gradients are bit-identical in every run, cuDNN's
are not. SDPA supports packed documents only through a T x T mask, and then also computes the blocks between documents;
one call per document would need their lengths on the host.

The reference (CPUs) is SDPA. On the CPU it requires equal head sizes, so values are padded with zeros. With packed
documents, the CPU runs one fused call per document instead of masking whole sequences, so it never computes the blocks
between documents. One thread, B=8, H=4, heads of 48 and 32, forward + backward, ms (documents of 100 tokens):

              fused causal   unfused causal   fused with a mask   fused per document
    T=256               23               25                  20                   13
    T=512               76              120                  77                   30

Other devices that run the reference use the mask, which needs no lengths on the host.

Accuracy of the Triton implementation against float64: scores, sums and products are FP32, but the weights are rounded
to the input dtype before they multiply the values, and so is the result. With u = 2^-8 for BF16, 2^-11 for FP16, each
of the two roundings moves an output by at most u times the largest value. So an output is off by at most 2 u of that,
plus FP32's share, 2^-22 times the largest score. The gradients of scores are rounded the same way before they multiply
queries and keys.

Shapes: B rows, T tokens, H heads, A elements of a query or key head, V elements of a value head.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from moray.kernels.attention_backward import SavedTensors, attention_backward
from moray.kernels.attention_forward import attention_forward
from moray.kernels.attention_tiles import KernelBlocks, default_blocks
from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import backend
from moray.kernels.util.document_bounds import DocumentBounds

_MAX_WIDTH = 256  # elements of a query head


def _fused(q_BTHA: Tensor, k_BTHA: Tensor, v_BTHA: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = q_BTHA.transpose(1, 2), k_BTHA.transpose(1, 2), v_BTHA.transpose(1, 2)
    out_BHTA = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out_BHTA.transpose(1, 2)


def _suits_cudnn(q_BTHA: Tensor, k_BTHA: Tensor, v_BTHV: Tensor) -> bool:
    if not q_BTHA.is_cuda:
        return False
    q, k, v = (x.transpose(1, 2) for x in (q_BTHA, k_BTHA, v_BTHV))
    return can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, False))  # no mask, no dropout, causal, no GQA


def _per_document(q_BTHA: Tensor, k_BTHA: Tensor, v_BTHA: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(torch.split(x.flatten(0, 1), list(lengths)) for x in (q_BTHA, k_BTHA, v_BTHA)), strict=True)
    outputs = [_fused(q[None], k[None], v[None], scale, None)[0] for q, k, v in parts]
    return torch.cat(outputs).view_as(q_BTHA)


def pad_values(v_BTHV: Tensor, width: int) -> Tensor:
    """Pads value heads with zeros to the width of query heads, if they are narrower."""
    return v_BTHV if v_BTHV.shape[-1] == width else F.pad(v_BTHV, (0, width - v_BTHV.shape[-1]))


def document_mask(documents: DocumentBounds) -> Tensor:
    """True where a query (row of the last two axes) attends to a key: same document, not later. [B, 1, T, T]."""
    index_BT = documents.index_BT
    same = index_BT[:, None, :, None] == index_BT[:, None, None, :]
    return same.tril()


def _check_width(q_BTHA: Tensor, v_BTHV: Tensor) -> None:
    if v_BTHV.shape[-1] > q_BTHA.shape[-1]:
        raise ValueError(f"value heads of {v_BTHV.shape[-1]} are wider than query heads of {q_BTHA.shape[-1]}")


def causal_attention_reference(
    q_BTHA: Tensor, k_BTHA: Tensor, v_BTHV: Tensor, scale: float, documents: DocumentBounds | None = None
) -> Tensor:
    """softmax(scale * q k^T) v over earlier tokens of the same document (of the row without `documents`).

    Returns [B, T, H, V]. V must not exceed A.
    """
    _check_width(q_BTHA, v_BTHV)
    v_BTHA = pad_values(v_BTHV, q_BTHA.shape[-1])
    batch = q_BTHA.shape[0]
    if documents is None or (documents.lengths is not None and len(documents.lengths) == batch):
        out = _fused(q_BTHA, k_BTHA, v_BTHA, scale, None)
    elif documents.lengths is not None:
        out = _per_document(q_BTHA, k_BTHA, v_BTHA, scale, documents.lengths)
    else:
        out = _fused(q_BTHA, k_BTHA, v_BTHA, scale, document_mask(documents))
    return out[..., : v_BTHV.shape[-1]]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHA: Tensor,
        k_BTHA: Tensor,
        v_BTHV: Tensor,
        scale: float,
        start_BT: Tensor,
        blocks: KernelBlocks,
    ) -> Tensor:
        out_BTHV, lse_BHT = attention_forward(q_BTHA, k_BTHA, v_BTHV, scale, start_BT, blocks.forward)
        ctx.save_for_backward(q_BTHA, k_BTHA, v_BTHV, out_BTHV, lse_BHT, start_BT)
        ctx.scale, ctx.blocks = scale, blocks
        return out_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        gradients = attention_backward(SavedTensors(*ctx.saved_tensors), dout_BTHV, ctx.scale, ctx.blocks)
        return *gradients, None, None, None


def _starts(documents: DocumentBounds | None, like: Tensor) -> Tensor:
    """Position of the first token of each token's document in its row: int32 [B, T]."""
    if documents is None:
        return torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)
    positions_BT = documents.positions_BT
    check_tensor(
        "documents.positions_BT", positions_BT, like.shape[:2], (torch.int64,), like=like, strides=(None, None)
    )
    return (torch.arange(positions_BT.shape[1], device=like.device) - positions_BT).int()


def causal_attention_triton(
    q_BTHA: Tensor,
    k_BTHA: Tensor,
    v_BTHV: Tensor,
    scale: float,
    documents: DocumentBounds | None = None,
    blocks: KernelBlocks | None = None,
) -> Tensor:
    """`causal_attention_reference` for BF16, FP16 and FP32, with gradients; returns a contiguous [B, T, H, V].

    Accepts any strides except in the last axis, where the stride must be 1; heads of at most 256 elements; a positive
    `scale`. `blocks` is for tuning. Raises ValueError for invalid arguments.
    """
    lead = tuple(q_BTHA.shape[:3])
    strides = (None, None, None, 1)
    check_tensor("q_BTHA", q_BTHA, (None,) * 4, FLOAT_DTYPES, strides=strides)
    check_tensor("k_BTHA", k_BTHA, q_BTHA.shape, (q_BTHA.dtype,), like=q_BTHA, strides=strides)
    check_tensor("v_BTHV", v_BTHV, (*lead, None), (q_BTHA.dtype,), like=q_BTHA, strides=strides)
    _check_width(q_BTHA, v_BTHV)
    if q_BTHA.shape[-1] > _MAX_WIDTH:
        raise ValueError(f"query heads of {q_BTHA.shape[-1]}, expected {_MAX_WIDTH} at most")
    if not scale > 0:
        raise ValueError(f"scale = {scale}, expected a positive number")
    start_BT = _starts(documents, q_BTHA)
    blocks = blocks or default_blocks(q_BTHA, v_BTHV)
    out: Tensor = _CausalAttention.apply(q_BTHA, k_BTHA, v_BTHV, scale, start_BT, blocks)  # type: ignore[no-untyped-call]
    return out


def attention_backend(x: Tensor) -> Literal["reference", "triton"]:
    """The backend that `causal_attention` uses for a tensor's device and dtype. FP64 has no Triton kernel."""
    return "reference" if x.dtype == torch.float64 else backend(x)


def causal_attention(
    q_BTHA: Tensor, k_BTHA: Tensor, v_BTHV: Tensor, scale: float, documents: DocumentBounds | None = None
) -> Tensor:
    """softmax(scale * q k^T) v over earlier tokens of the same document (of the row without `documents`).

    Returns [B, T, H, V]. V must not exceed A.
    """
    if attention_backend(q_BTHA) == "reference":
        return causal_attention_reference(q_BTHA, k_BTHA, v_BTHV, scale, documents)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHA, k_BTHA, v_BTHV))
    if documents is None and _suits_cudnn(q, k, v):
        _check_width(q, v)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _fused(q, k, v, scale, None)
    return causal_attention_triton(q, k, v, scale, documents)
