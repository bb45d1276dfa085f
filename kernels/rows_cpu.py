"""FP8 packing of rows on the CPU in one pass (`rows_numba.py`): the bits of the references, ten times as fast.

Without numba, the references run instead.

Shapes: T tokens, D columns, P ranks, N bytes of metadata.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHIFTS = {torch.float32: 0, torch.bfloat16: 16}  # from a dtype's bits to those of FP32


@cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def compiles(rows: Tensor) -> bool:
    """Whether the compiled implementations run for these rows. They never run if MORAY_KERNELS is set."""
    return rows.device.type == "cpu" and rows.dtype in _SHIFTS and "MORAY_KERNELS" not in os.environ and _installed()


def pack_rows_compiled(rows_TD: Tensor) -> Tensor:
    """`wire.pack_rows_reference`, compiled."""
    tokens, columns = rows_TD.shape
    out_TW = torch.empty((tokens, columns + -(-columns // 128)), dtype=torch.uint8)
    from moray.kernels.rows_numba import pack_rows_numba  # imports numba, which is slow

    pack_rows_numba(*_bits(rows_TD), out_TW.numpy())
    return out_TW


def push_rows_compiled(rows_TD: Tensor, metadata_TN: Tensor, sent_PT: Tensor, inboxes: Sequence[Tensor]) -> None:
    """`push.push_rows_reference`, compiled."""
    from moray.kernels.rows_numba import push

    arrays = tuple(inbox.numpy() for inbox in inboxes)
    push(*_bits(rows_TD), metadata_TN.numpy(), sent_PT.t().contiguous().numpy(), arrays)


def _bits(rows_TD: Tensor) -> tuple[Any, np.int32]:
    shift = _SHIFTS[rows_TD.dtype]
    return rows_TD.contiguous().view(torch.int16 if shift else torch.int32).numpy(), np.int32(shift)
