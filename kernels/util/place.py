"""Where a tensor is in memory, also for tensors without data."""

from torch import Tensor


def place(tensor: Tensor) -> tuple[int, int]:
    """Its storage, and its first element there. Valid while the tensor lives; tensors of the meta device, whose address
    is always 0, have one too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
