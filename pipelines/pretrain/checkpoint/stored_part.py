"""A part of a logical tensor, for torch.distributed.checkpoint.

torch stores shards of its DTensors, which are split by rows, but an optimizer's partition may start at any element. The
planner accepts any tensor that reports which elements of the whole it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class StoredPart(torch.Tensor):
    """Elements [offset, offset + len(part)) of a flat tensor of `total` elements; `part` is live memory.

    To torch it is a tensor of the whole shape, without data.
    """

    part: torch.Tensor
    offset: int

    @staticmethod
    def __new__(cls, part: torch.Tensor, offset: int, total: int) -> StoredPart:
        made: StoredPart = torch.Tensor._make_wrapper_subclass(cls, (total,), dtype=part.dtype, device=part.device)
        made.part, made.offset = part.detach(), offset
        return made

    def __init__(self, part: torch.Tensor, offset: int, total: int) -> None:
        """Does nothing: `__new__` initialises the object."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} is not supported for a part of a tensor")

    def fits(self, source: torch.Tensor, offset: int, total: int) -> bool:
        """Whether `source`, at `offset` of `total` elements, can be copied to this part."""
        held = self.part.shape, self.part.dtype, self.offset, self.numel()
        return held == (source.shape, source.dtype, offset, total)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredPart([{self.offset}, {self.offset + len(self.part)}) of {self.numel()})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.offset]), self.part.size())]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(
            self.__create_chunk_list__()[0], TensorProperties.create_from_tensor(self.part), self.size()
        )
        return [WriteItem(MetadataIndex(key, torch.Size([self.offset])), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, _: MetadataIndex) -> torch.Tensor:
        return self.part
