"""Causal attention for training, over whole rows or over the documents packed in them.

Notable: the value heads of multi-head latent attention are narrower than its query heads, and PyTorch's fused
attention on the CPU takes only equal sizes, so values are padded with zeros. With packed documents, the CPU runs one
fused call per document instead of masking whole rows: it never computes the blocks between documents. One thread,
B=8, H=4, heads of 48 and 32, forward + backward, ms (documents of 100 tokens):

              fused causal   unfused causal   fused with a mask   fused per document
    T=256               23               25                  20                   13
    T=512               76              120                  77                   30

Other devices take the mask, which needs no lengths on the host.

Shapes: B rows, T tokens, H heads, A elements of a query or key head, V elements of a value head, X = B * T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.documents import Documents


def _fused(q_BTHA: Tensor, k_BTHA: Tensor, v_BTHA: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = q_BTHA.transpose(1, 2), k_BTHA.transpose(1, 2), v_BTHA.transpose(1, 2)
    out_BHTA = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out_BHTA.transpose(1, 2)


def _per_document(q_BTHA: Tensor, k_BTHA: Tensor, v_BTHA: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(torch.split(x.flatten(0, 1), list(lengths)) for x in (q_BTHA, k_BTHA, v_BTHA)), strict=True)
    outputs = [_fused(q[None], k[None], v[None], scale, None)[0] for q, k, v in parts]
    return torch.cat(outputs).view_as(q_BTHA)


def pad_values(v_BTHV: Tensor, width: int) -> Tensor:
    """Value heads filled up with zeros to the width of query heads, if they are narrower."""
    return v_BTHV if v_BTHV.shape[-1] == width else F.pad(v_BTHV, (0, width - v_BTHV.shape[-1]))


def document_mask(documents: Documents) -> Tensor:
    """True where a query (row of the last two axes) sees a key: same document, not later. [B, 1, T, T]."""
    index_BT = documents.index_BT
    same = index_BT[:, None, :, None] == index_BT[:, None, None, :]
    return same.tril()


def causal_attention_reference(
    q_BTHA: Tensor, k_BTHA: Tensor, v_BTHV: Tensor, scale: float, documents: Documents | None = None
) -> Tensor:
    """softmax(scale * q k^T) v over earlier tokens of the same document (of the row without `documents`).

    Returns [B, T, H, V]. V must not exceed A.
    """
    width_V = v_BTHV.shape[-1]
    if width_V > q_BTHA.shape[-1]:
        raise ValueError(f"value heads of {width_V} are wider than query heads of {q_BTHA.shape[-1]}")
    v_BTHA = pad_values(v_BTHV, q_BTHA.shape[-1])
    batch = q_BTHA.shape[0]
    if documents is None or (documents.lengths is not None and len(documents.lengths) == batch):
        out = _fused(q_BTHA, k_BTHA, v_BTHA, scale, None)
    elif documents.lengths is not None:
        out = _per_document(q_BTHA, k_BTHA, v_BTHA, scale, documents.lengths)
    else:
        out = _fused(q_BTHA, k_BTHA, v_BTHA, scale, document_mask(documents))
    return out[..., :width_V]


causal_attention = causal_attention_reference
