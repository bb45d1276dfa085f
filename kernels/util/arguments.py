"""Checks of kernel arguments before a launch: with a wrong shape, a kernel would access memory of other tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_DTYPES = (torch.float8_e4m3fn,)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    *,
    like: Tensor | None = None,
    strides: Sequence[int | None] | None = None,
) -> None:
    """Raises ValueError with the argument's name, its value and the expected value.

    shape: None for an axis of any size. like: a tensor on the device it must share. strides: None for any; by default
    the tensor must be contiguous.
    """
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(want in (None, size) for size, want in zip(found, shape, strict=True))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {found}, expected ({expected})")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on device {tensor.device}, expected {like.device}")
    if not tensor.numel():  # it may have any strides
        return
    if strides is None:
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    elif not all(want in (None, have) for have, want in zip(tensor.stride(), strides, strict=True)):
        expected = ", ".join("any" if stride is None else str(stride) for stride in strides)
        raise ValueError(f"{name} has strides {tensor.stride()}, expected ({expected})")
