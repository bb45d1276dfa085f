"""Dispatchers: rows to experts and back, within a process and across a process group.

`LocalDispatcher` sorts. `ProcessGroupDispatcher` sorts, exchanges with all_to_all_single (gloo on the CPU, NCCL on
GPUs) and sorts what arrived by local expert. Expert e lives on rank e // (E / ranks).

In FP8 training, what goes to experts goes in FP8 (`kernels/wire.py`): rows forward, gradients of their outputs
backward. What comes home is summed there, and comes in the rows' own dtype (DeepSeek-V3 §3.3.3). The rows that do not
leave the process are rounded all the same: what is computed depends on no layout.

On the way to the experts a row crosses once to each rank that has any of its token's (`copies.py`), and is expanded
there. On the way home every expert's result is a row of its own, since its weight is known at home only.

Notable: per dispatch, one small exchange of counts and one copy of them to the host (the exchange of rows needs its
split sizes there). The backward of an exchange is the reverse exchange, so all ranks must run the same layers in the
same order; a rank that sends or receives no rows takes part all the same.

Shapes: T tokens, K slots, E experts, P ranks, L = E / P local experts, R rows here, S = T * K rows sent, D hidden size,
X columns of any meaning.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.permute import PairOrder, inverse_permutation, sort_pairs
from moray.kernels.wire import pack_rows, unpack_rows
from moray.models.copies import Copies, expand
from moray.models.layer import Dispatcher, Handle

# Made for a device, and entered around every exchange on it: whoever wants to know what communication takes.
Timed = Callable[[torch.device], AbstractContextManager[None]]


def _untimed(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Crossing:
    """The part of the way that lies between ranks.

    sent_P, received_P: rows to and from each rank, one for each pair of token and expert. order_R, inverse_R: from the
    order of arrival (rank by rank) to the order by local expert. copies: those sent on the way there,
    copied_P to each rank, and arriving_P come from each, for `local` experts here.
    """

    group: dist.ProcessGroup
    sent_P: tuple[int, ...]
    received_P: tuple[int, ...]
    order_R: Tensor
    inverse_R: Tensor
    copies: Copies
    copied_P: tuple[int, ...]
    arriving_P: tuple[int, ...]
    local: int
    timed: Timed

    def once(self, rows_TX: Tensor) -> Tensor:
        """A token's row to all its experts, by one copy for each rank."""
        arrived_AW = self._exchange(self.copies.made(rows_TX), self.copied_P, self.arriving_P)
        return expand(arrived_AW, rows_TX, self.local, sum(self.received_P))

    def there(self, rows_SX: Tensor) -> Tensor:
        return self._exchange(rows_SX, self.sent_P, self.received_P).index_select(0, self.order_R)

    def back(self, rows_RX: Tensor) -> Tensor:
        return self._exchange(rows_RX.index_select(0, self.inverse_R), self.received_P, self.sent_P)

    def _exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        with self.timed(rows.device):
            dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=self.group)
        return out


@dataclass(frozen=True)
class Way:
    """The way of one layer's rows: to the experts, in FP8 if `fp8`, and home."""

    pairs: PairOrder
    slots: int
    fp8: bool
    crossing: Crossing | None

    def tokens_to_experts(self, rows_TD: Tensor) -> Tensor:
        """Every token's row where its experts are: rows_RD."""
        if self.crossing is None:
            return self._rounded(rows_TD).index_select(0, self.pairs.order_R // self.slots)
        arrived_RX = self.crossing.once(pack_rows(rows_TD) if self.fp8 else rows_TD)
        return unpack_rows(arrived_RX, rows_TD.shape[1], rows_TD.dtype) if self.fp8 else arrived_RX

    def pairs_to_experts(self, rows_SD: Tensor) -> Tensor:
        """Every pair's row, slot by slot, where its expert is: rows_RD."""
        if self.crossing is None:
            return self._rounded(rows_SD).index_select(0, self.pairs.order_R)
        sent_SX = (pack_rows(rows_SD) if self.fp8 else rows_SD).index_select(0, self.pairs.order_R)
        arrived_RX = self.crossing.there(sent_SX)
        return unpack_rows(arrived_RX, rows_SD.shape[1], rows_SD.dtype) if self.fp8 else arrived_RX

    def _rounded(self, rows_XD: Tensor) -> Tensor:
        return unpack_rows(pack_rows(rows_XD), rows_XD.shape[1], rows_XD.dtype) if self.fp8 else rows_XD

    def home(self, rows_RD: Tensor) -> Tensor:
        """Every pair's row where its token is: rows_TKD."""
        if self.crossing is not None:
            rows_RD = self.crossing.back(rows_RD)
        return rows_RD.index_select(0, self.pairs.inverse_R).view(-1, self.slots, rows_RD.shape[1])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.tokens_to_experts(rows_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.way.home(grads[0]).sum(1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.home(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.way.pairs_to_experts(grads[0].flatten(0, 1)), None


@dataclass(frozen=True)
class Dispatched:
    """Rows at their experts, and the way home."""

    rows_RD: Tensor
    counts_E: Tensor
    way: Way

    @classmethod
    def along(cls, way: Way, rows_TD: Tensor, counts_E: Tensor) -> "Dispatched":
        rows_RD: Tensor = _Dispatch.apply(rows_TD, way)  # type: ignore[no-untyped-call]
        return cls(rows_RD, counts_E, way)


def _combine(handle: Handle, rows_RD: Tensor) -> Tensor:
    assert isinstance(handle, Dispatched)
    rows_TKD: Tensor = _Combine.apply(rows_RD, handle.way)  # type: ignore[no-untyped-call]
    return rows_TKD


class LocalDispatcher:
    """All experts are here."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, rows_TD: Tensor, expert_ids_TK: Tensor, fp8: bool = False) -> Dispatched:
        pairs = sort_pairs(expert_ids_TK, self.num_experts)
        return Dispatched.along(Way(pairs, expert_ids_TK.shape[1], fp8, None), rows_TD, pairs.counts_E)

    def combine(self, handle: Handle, rows_RD: Tensor) -> Tensor:
        return _combine(handle, rows_RD)


class ProcessGroupDispatcher:
    """Experts are spread evenly over the ranks of a torch.distributed group.

    `experts` is the range that this rank must hold. Raises ValueError when the experts do not divide.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, timed: Timed = _untimed) -> None:
        self.group = group
        self.timed = timed
        self.ranks = dist.get_world_size(group)
        if num_experts % self.ranks:
            raise ValueError(f"{num_experts} experts do not divide over the {self.ranks} ranks of the group")
        self.num_experts = num_experts
        self.num_local = num_experts // self.ranks
        first = dist.get_rank(group) * self.num_local
        self.experts = range(first, first + self.num_local)

    def dispatch(self, rows_TD: Tensor, expert_ids_TK: Tensor, fp8: bool = False) -> Dispatched:
        pairs = sort_pairs(expert_ids_TK, self.num_experts)
        copies = Copies.of(expert_ids_TK, self.ranks, self.num_local)
        (sent_PL, copied_P), (received_PL, arriving_P) = self._exchange_counts(pairs.counts_E, copies.counts_P)
        there_P, here_P = tuple(copied_P.tolist()), tuple(arriving_P.tolist())
        sent_P, received_P = tuple(sent_PL.sum(1).tolist()), tuple(received_PL.sum(1).tolist())
        orders = self._arrival_order(received_PL, rows_TD.device)
        crossing = Crossing(
            self.group, sent_P, received_P, *orders, copies, there_P, here_P, self.num_local, self.timed
        )
        return Dispatched.along(Way(pairs, expert_ids_TK.shape[1], fp8, crossing), rows_TD, received_PL.sum(0))

    def combine(self, handle: Handle, rows_RD: Tensor) -> Tensor:
        return _combine(handle, rows_RD)

    def _exchange_counts(
        self, counts_E: Tensor, copies_P: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """From here, and to here: pairs for each expert of each rank, [P, L], and copies for each rank, [P]; on the
        host."""
        sent_PX = torch.cat((counts_E.view(self.ranks, self.num_local), copies_P.unsqueeze(1)), dim=1)
        received_PX = torch.empty_like(sent_PX)
        with self.timed(counts_E.device):
            dist.all_to_all_single(received_PX, sent_PX, group=self.group)
        both = torch.stack((sent_PX, received_PX)).cpu()  # the one sync
        return (both[0, :, :-1], both[0, :, -1]), (both[1, :, :-1], both[1, :, -1])

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
