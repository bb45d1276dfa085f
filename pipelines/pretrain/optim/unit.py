"""A unit of weights: the dense matrices of a layer, or its experts, which are gathered, reduced and updated together.

Every rank that holds a unit owns a part of its masters. The weights that layers multiply by have the training's own
dtype and are either complete on every rank, or sharded and gathered while a layer uses them. So are gradients: either
complete until the end of a step, or reduced to a shard after each backward.

    form               dtype       elements on a rank        lifetime
    master, moments    FP32        1 / R                     always
    weights            compute's   1 / S, or all (S = 1)     from one step to the next
    gathered weights   compute's   all                       while a layer uses them
    gradient           FP32        all                       always; if S > 1, until reduced after a backward
    gradient's shard   FP32        1 / S                     always, if S > 1

R ranks hold the unit. They are S x N: S ranks that share the weights or gradients, and N copies of these shards. Shard
s is elements [s / S, (s + 1) / S) of the flat buffer, and copy n of it owns the n-th part of that as its master.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moray.models.fp8 import QuantizationCache
from moray.pipelines.pretrain.optim.flat import FlatGroup

# torch 2.13 renamed these.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class RankSet:
    """Some of the ranks that hold a unit. group: None if this rank is the only one."""

    size: int
    index: int
    group: dist.ProcessGroup | None

    @classmethod
    def alone(cls) -> RankSet:
        return cls(1, 0, None)


@dataclass(frozen=True)
class RankSplit:
    """The ranks that share a unit, and the ranks that have the same share."""

    shards: RankSet
    copies: RankSet

    @property
    def partition(self) -> int:
        """The index of this rank's masters."""
        return self.shards.index * self.copies.size + self.copies.index


Cache = tuple[QuantizationCache[Any], tuple[torch.nn.Parameter, ...]]


class Unit:
    """weights, gradients: how these are split; both name the same partition. caches: the quantizations of the unit's
    weights, which have the lifetime of the weights. narrow: gradients are summed over ranks in BF16."""

    def __init__(
        self,
        group: FlatGroup,
        dtype: torch.dtype,
        device: torch.device,
        weights: RankSplit,
        gradients: RankSplit,
        caches: Sequence[Cache],
        narrow: bool,
    ) -> None:
        assert weights.partition == gradients.partition
        self.group, self._weights, self._gradients = group, weights, gradients
        self._caches, self._narrow, self._dtype = caches, narrow, dtype
        quantized = {id(weight) for _, owners in caches for weight in owners}
        # Resident weights whose quantizations are all that layers multiply by are not kept themselves.
        self._quantized_only = all(id(parameter) in quantized for parameter in group.parameters)
        wide = torch.promote_types(dtype, torch.float32)
        self.master = torch.nn.Parameter(_unset(group.partition, wide, device))
        self.master.grad = _zeros(group.partition, wide, device)
        for parameter in group.parameters:
            absent = torch.nn.Parameter(_absent(parameter.shape, dtype, device))
            torch.utils.swap_tensors(parameter, absent)  # type: ignore[no-untyped-call]
            parameter.grad_dtype = wide
        self._shard = torch.empty(0, dtype=dtype, device=device)
        self._whole: torch.Tensor | None = None
        self._gathering: dist.Work | None = None
        self._gradient: torch.Tensor | None = None
        self._gradient_shard: torch.Tensor | None = None
        if gradients.shards.size == 1:
            self._gradient = self.master.grad if gradients.copies.size == 1 else _zeros(group.numel, wide, device)
            self._attach_gradient()
        else:
            alone = gradients.copies.size == 1
            share = group.numel // gradients.shards.size
            self._gradient_shard = self.master.grad if alone else _zeros(share, wide, device)
        self._reducing: tuple[dist.Work, torch.Tensor, torch.Tensor] | None = None

    @property
    def begin(self) -> int:
        """The first element of this rank's masters in the flat buffer."""
        return self._weights.partition * self.group.partition

    @property
    def is_sharded(self) -> bool:
        """Whether the weights have to be gathered."""
        return self._weights.shards.size > 1

    # Weights

    def refresh(self) -> None:
        """Makes the weights from the masters of all ranks."""
        self._detach()
        self._shard = self._shard.new_empty(0)  # frees the old ones first
        part = self.master.detach().to(self._dtype)
        copies = self._weights.copies
        if copies.group is None:
            self._shard = part  # in the masters' own dtype these are the masters
        else:
            self._shard = part.new_empty(part.numel() * copies.size)
            _all_gather(self._shard, part, group=copies.group)
        if not self.is_sharded:
            self._whole = self._shard
            self._attach()
            if self._quantized_only:
                self._shard = self._shard.new_empty(0)
                self._detach()

    def gather(self) -> None:
        """Starts to gather the weights, if they are sharded and not gathered yet."""
        if self.is_sharded and self._whole is None:
            shards = self._weights.shards
            self._whole = self._shard.new_empty(self.group.numel)
            self._gathering = _all_gather(self._whole, self._shard, group=shards.group, async_op=True)

    def wait(self) -> None:
        """Waits until the weights are gathered, and gives them to the layers."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
            self._attach()

    def release(self) -> None:
        """Frees gathered weights and their quantizations."""
        if self.is_sharded and self._whole is not None:
            self.wait()
            self._detach()
            for cache, _ in self._caches:
                cache.drop()

    def _attach(self) -> None:
        assert self._whole is not None
        for parameter, view in self._views(self._whole):
            parameter.data = view
        for cache, weights in self._caches:
            cache.hold(*weights)

    def _detach(self) -> None:
        self._whole = None
        for parameter in self.group.parameters:
            parameter.data = _absent(parameter.shape, self._dtype, self.master.device)

    # Gradients

    def open_gradient(self) -> None:
        """Allocates the gradient, to which backwards add, if it is not kept for the whole step."""
        if self._gradient is None:
            assert self.master.grad is not None
            self._gradient = _zeros(self.group.numel, self.master.dtype, self.master.device)
            self._attach_gradient()

    def reduce(self, last: bool) -> None:
        """Starts to sum the gradient over ranks: to its shard after any backward, or, if it is kept for the whole step,
        to the master's after the last."""
        assert self._gradient is not None
        assert self.master.grad is not None
        shards, copies = self._gradients.shards, self._gradients.copies
        if shards.size > 1:
            self._start(self._gradient, shards)
            self._gradient = None
            for parameter in self.group.parameters:
                parameter.grad = None
        elif last and copies.size > 1:
            self._start(self._gradient, copies)

    def finish_reduction(self) -> None:
        """Waits for `reduce`, and adds its result."""
        if self._reducing is not None:
            (work, _, part), self._reducing = self._reducing, None
            work.wait()
            target = self.master.grad if self._gradient_shard is None else self._gradient_shard
            assert target is not None
            target.add_(part)

    def complete_gradient(self) -> None:
        """Sums shards over their copies, at the end of a step."""
        copies = self._gradients.copies
        if self._gradient_shard is not None and copies.size > 1:
            self._start(self._gradient_shard, copies)
            (work, _, part), self._reducing = self._reducing, None  # type: ignore[misc]
            work.wait()
            assert self.master.grad is not None
            self.master.grad.copy_(part)

    def clear_gradient(self) -> None:
        for tensor in (self.master.grad, self._gradient, self._gradient_shard):
            if tensor is not None:
                tensor.zero_()

    def _start(self, gradient: torch.Tensor, ranks: RankSet) -> None:
        sent = gradient.bfloat16() if self._narrow else gradient
        part = sent.new_empty(sent.numel() // ranks.size)
        self._reducing = (_reduce_scatter(part, sent, group=ranks.group, async_op=True), sent, part)

    def _attach_gradient(self) -> None:
        assert self._gradient is not None
        for parameter, view in self._views(self._gradient):
            parameter.grad = view

    def _views(self, flat: torch.Tensor) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        pairs = zip(self.group.parameters, self.group.starts, strict=True)
        return [(one, flat[start : start + one.numel()].view(one.shape)) for one, start in pairs]


def _unset(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((numel,), float("nan"), dtype=dtype, device=device)


def _zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(numel, dtype=dtype, device=device)


def _absent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaNs in place of weights that are not in memory: a layer that uses them by mistake has a loss of NaN."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)
