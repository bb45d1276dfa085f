"""Dispatchers: rows to experts and back, within a process and across a process group.

`LocalDispatcher` sorts. `ProcessGroupDispatcher` sorts, exchanges with all_to_all_single (gloo on the CPU, NCCL on
GPUs) and sorts what arrived by local expert. Expert e lives on rank e // (E / ranks).

Notable: per dispatch, one small exchange of counts and one copy of them to the host (the exchange of rows needs its
split sizes there). The backward of an exchange is the reverse exchange, so all ranks must run the same layers in the
same order; a rank that sends or receives no rows takes part all the same.

Shapes: T tokens, K slots, E experts, P ranks, L = E / P local experts, R rows here, S rows sent, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.permute import PairOrder, inverse_permutation, move_rows, sort_pairs, spread_rows
from moray.models.layer import Dispatcher, Handle


@dataclass(frozen=True)
class LocalHandle:
    """Rows sorted by expert, and the order that undoes the sort."""

    rows_RD: Tensor
    scales: Tensor | None
    counts_E: Tensor
    pairs: PairOrder
    slots: int


def _send(rows_TD: Tensor, scales: Tensor | None, pairs: PairOrder, slots: int) -> tuple[Tensor, Tensor | None]:
    """Rows and scales, one per pair, sorted by expert."""
    sorted_scales = None if scales is None else scales.index_select(0, pairs.order_R // slots)
    return spread_rows(rows_TD, pairs, slots), sorted_scales


def _by_slot(rows_RD: Tensor, pairs: PairOrder, slots: int) -> Tensor:
    home_RD = move_rows(rows_RD, pairs.inverse_R, pairs.order_R)
    return home_RD.view(-1, slots, rows_RD.shape[-1])


class LocalDispatcher:
    """All experts are here."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, rows_TD: Tensor, scales: Tensor | None, expert_ids_TK: Tensor) -> LocalHandle:
        slots = expert_ids_TK.shape[1]
        pairs = sort_pairs(expert_ids_TK, self.num_experts)
        rows_RD, sorted_scales = _send(rows_TD, scales, pairs, slots)
        return LocalHandle(rows_RD, sorted_scales, pairs.counts_E, pairs, slots)

    def combine(self, handle: Handle, rows_RD: Tensor) -> Tensor:
        assert isinstance(handle, LocalHandle)
        return _by_slot(rows_RD, handle.pairs, handle.slots)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


def _exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Differentiable: gradients go back the way the rows came."""
    out: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class GroupHandle:
    """Rows that came to this rank, and the way back.

    pairs: the sort before sending. sent_P, received_P: rows to and from each rank. order_R, inverse_R: from the order
    of arrival (rank by rank) to the order by local expert.
    """

    rows_RD: Tensor
    scales: Tensor | None
    counts_E: Tensor
    pairs: PairOrder
    slots: int
    sent_P: tuple[int, ...]
    received_P: tuple[int, ...]
    order_R: Tensor
    inverse_R: Tensor


class ProcessGroupDispatcher:
    """Experts are spread evenly over the ranks of a torch.distributed group.

    `experts` is the range that this rank must hold. Raises ValueError when the experts do not divide.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        if num_experts % self.ranks:
            raise ValueError(f"{num_experts} experts do not divide over the {self.ranks} ranks of the group")
        self.num_experts = num_experts
        self.num_local = num_experts // self.ranks
        first = dist.get_rank(group) * self.num_local
        self.experts = range(first, first + self.num_local)

    def dispatch(self, rows_TD: Tensor, scales: Tensor | None, expert_ids_TK: Tensor) -> GroupHandle:
        slots = expert_ids_TK.shape[1]
        pairs = sort_pairs(expert_ids_TK, self.num_experts)
        sent_PL, received_PL = self._exchange_counts(pairs.counts_E)
        sent_P, received_P = tuple(sent_PL.sum(1).tolist()), tuple(received_PL.sum(1).tolist())
        order_R, inverse_R = self._arrival_order(received_PL, rows_TD.device)
        rows_SD, sorted_scales = _send(rows_TD, scales, pairs, slots)
        arrived_RD = _exchange(rows_SD, sent_P, received_P, self.group)
        if sorted_scales is not None:
            sorted_scales = _all_to_all(sorted_scales, sent_P, received_P, self.group).index_select(0, order_R)
        return GroupHandle(
            rows_RD=move_rows(arrived_RD, order_R, inverse_R),
            scales=sorted_scales,
            counts_E=received_PL.sum(0),
            pairs=pairs,
            slots=slots,
            sent_P=sent_P,
            received_P=received_P,
            order_R=order_R,
            inverse_R=inverse_R,
        )

    def combine(self, handle: Handle, rows_RD: Tensor) -> Tensor:
        assert isinstance(handle, GroupHandle)
        arrived_RD = move_rows(rows_RD, handle.inverse_R, handle.order_R)
        home_SD = _exchange(arrived_RD, handle.received_P, handle.sent_P, self.group)
        return _by_slot(home_SD, handle.pairs, handle.slots)

    def _exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs from here to each expert of each rank, and from each rank to each expert here: [P, L] on the host."""
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        both = torch.stack((counts_E, received_E)).cpu()  # the one sync
        sent_PL, received_PL = both.view(2, self.ranks, self.num_local).unbind(0)
        return sent_PL, received_PL

    def _arrival_order(self, received_PL: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows arrive by rank, then by expert; the experts want them by expert, then by rank."""
        experts_PL = torch.arange(self.num_local).repeat(self.ranks)
        order_R = experts_PL.repeat_interleave(received_PL.flatten()).argsort(stable=True).to(device)
        return order_R, inverse_permutation(order_R)


def dispatcher_for(experts: range, num_experts: int, given: Dispatcher | None) -> Dispatcher:
    """`given`, or the local dispatcher; ValueError where it does not fit the experts held here."""
    if given is None and experts != range(num_experts):
        raise ValueError(f"experts = {experts} is not all of {num_experts}: a dispatcher must reach the others")
    if isinstance(given, ProcessGroupDispatcher) and given.experts != experts:
        raise ValueError(f"experts = {experts}, but the dispatcher sends {given.experts} to this rank")
    return given or LocalDispatcher(num_experts)
