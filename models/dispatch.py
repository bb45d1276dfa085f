"""Dispatchers: rows to experts and back, within a process and across a process group.

`LocalDispatcher` sorts. `ProcessGroupDispatcher` sorts, exchanges with all_to_all_single (gloo on the CPU, NCCL on
GPUs) and sorts what arrived by local expert. Expert e lives on rank e // (E / ranks).

In FP8 training, what goes to experts goes in FP8 (`kernels/wire.py`): rows forward, gradients of their outputs
backward. What comes home is summed there, and comes in the rows' own dtype (DeepSeek-V3 §3.3.3). The rows that do not
leave the process are rounded all the same: what is computed depends on no layout.

On the way to the experts a row crosses once to each rank that has any of its token's (`copies.py`), and is expanded
there. On the way home every expert's result is a row of its own, since its weight is known at home only.

Notable: a departure and an arrival are two nodes of autograd's graph, so that what is computed between them, forward
and backward, hides the way (`interleave.py`). Per dispatch there is one small exchange of counts, read on the host,
since an exchange of rows needs its split sizes there. The backward of an exchange is the reverse exchange, so all ranks
must run the same layers in the same order; a rank that sends or receives no rows takes part all the same.

Shapes: T tokens, K slots, E experts, P ranks, L = E / P local experts, R rows here, S = T * K rows sent, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.deferred import DeferredGradients
from moray.kernels.permute import PairOrder, sort_pairs
from moray.kernels.wire import pack_rows, unpack_rows
from moray.models.copies import Copies
from moray.models.crossing import Announcement, Crossing
from moray.models.layer import Dispatcher
from moray.models.link import Arrival, Link, Timed, untimed
from moray.models.peers import PeerMemory

Departure = Callable[[Tensor], Arrival]


@dataclass(frozen=True)
class Way:
    """The way of one layer's rows: to the experts, in FP8 if `fp8`, and home. Each call is a departure.

    Rows and their gradients: what `tokens_to_experts` brings, `sums_home` brings back; what `home` brings,
    `pairs_to_experts`.
    """

    pairs: PairOrder
    slots: int
    fp8: bool
    crossing: Crossing | None

    def tokens_to_experts(self, rows_TD: Tensor) -> Arrival:
        """Every token's row where its experts are: rows_RD."""
        if self.crossing is None:
            rows_RD = self._rounded(rows_TD).index_select(0, self.pairs.order_R // self.slots)
            return lambda: rows_RD
        arrival = self.crossing.once_packed(rows_TD) if self.fp8 else self.crossing.once(rows_TD)
        return self._unpacked(arrival, rows_TD)

    def pairs_to_experts(self, rows_TKD: Tensor) -> Arrival:
        """Every pair's row where its expert is: rows_RD."""
        rows_SD = rows_TKD.flatten(0, 1)
        if self.crossing is None:
            rows_RD = self._rounded(rows_SD).index_select(0, self.pairs.order_R)
            return lambda: rows_RD
        return self._unpacked(self.crossing.there(self._packed(rows_SD).index_select(0, self.pairs.order_R)), rows_SD)

    def home(self, rows_RD: Tensor) -> Arrival:
        """Every pair's row where its token is: rows_TKD."""
        if self.crossing is None:
            rows_TKD = self._by_token(rows_RD)
            return lambda: rows_TKD
        arrival = self.crossing.back(rows_RD)
        return lambda: self._by_token(arrival())

    def sums_home(self, rows_RD: Tensor) -> Arrival:
        """The sum of each token's rows where it is: rows_TD."""
        arrival = self.home(rows_RD)
        return lambda: arrival().sum(1)

    def _packed(self, rows_XD: Tensor) -> Tensor:
        return pack_rows(rows_XD) if self.fp8 else rows_XD

    def _unpacked(self, arrival: Arrival, like_XD: Tensor) -> Arrival:
        columns, dtype = like_XD.shape[1], like_XD.dtype
        return (lambda: unpack_rows(arrival(), columns, dtype)) if self.fp8 else arrival

    def _rounded(self, rows_XD: Tensor) -> Tensor:
        return unpack_rows(pack_rows(rows_XD), rows_XD.shape[1], rows_XD.dtype) if self.fp8 else rows_XD

    def _by_token(self, rows_SD: Tensor) -> Tensor:
        return rows_SD.index_select(0, self.pairs.inverse_R).view(-1, self.slots, rows_SD.shape[1])


class Trip:
    """A layer's dispatch (`layer.Dispatch`). `plan` waits until the way and the rows of each expert here are known.

    What is not needed any more it lets go: the graph holds it up to the backward.
    """

    def __init__(self, rows_TD: Tensor, plan: Callable[[], tuple[Way, Tensor]]) -> None:
        self._rows_TD: Tensor | None = rows_TD
        self._plan: Callable[[], tuple[Way, Tensor]] | None = plan
        self._way: Way | None = None
        self._counts_E: Tensor | None = None
        # Between a departure and its arrival the graph has an edge, and there is no tensor yet: this stands for it.
        self._ticket: Tensor | None = None
        self._arrival: Arrival | None = None

    @property
    def way(self) -> Way:
        assert self._way is not None, "rows are sent first"
        return self._way

    def send(self) -> None:
        assert self._plan is not None
        self._way, self._counts_E = self._plan()
        self._ticket = _Depart.apply(self._rows_TD, self, self._way.tokens_to_experts)  # type: ignore[no-untyped-call]
        self._plan = self._rows_TD = None

    def arrived(self) -> tuple[Tensor, Tensor]:
        assert self._counts_E is not None
        ticket, self._ticket = self._ticket, None
        rows_RD = _Arrive.apply(ticket, self, self.way.sums_home)  # type: ignore[no-untyped-call]
        return rows_RD, self._counts_E

    def send_back(self, rows_RD: Tensor) -> None:
        self._ticket = _Depart.apply(rows_RD, self, self.way.home)  # type: ignore[no-untyped-call]

    def home(self) -> Tensor:
        ticket, self._ticket = self._ticket, None
        rows_TKD: Tensor = _Arrive.apply(ticket, self, self.way.pairs_to_experts)  # type: ignore[no-untyped-call]
        return rows_TKD

    def under_way(self, arrival: Arrival) -> None:
        """Remembers the one transfer that this trip now waits for."""
        self._arrival = arrival

    def take(self) -> Tensor:
        """Waits for it; what arrived."""
        assert self._arrival is not None
        arrival, self._arrival = self._arrival, None
        return arrival()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_XD: Tensor, trip: Trip, departure: Departure) -> Tensor:
        ctx.trip = trip
        trip.under_way(departure(rows_XD))
        return rows_XD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        return ctx.trip.take(), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: Trip, gradients_departure: Departure) -> Tensor:
        ctx.trip, ctx.departure = trip, gradients_departure
        return trip.take()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ctx.trip.under_way(ctx.departure(grads[0]))
        return grads[0].new_empty(0), None, None


class LocalDispatcher:
    """All experts are here."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, rows_TD: Tensor, expert_ids_TK: Tensor, fp8: bool = False) -> Trip:
        pairs = sort_pairs(expert_ids_TK, self.num_experts)
        way = Way(pairs, expert_ids_TK.shape[1], fp8, None)
        return Trip(rows_TD, lambda: (way, pairs.counts_E))


class ProcessGroupDispatcher:
    """Experts are spread evenly over the ranks of a torch.distributed group.

    `experts` is the range that this rank must hold; `later` are gradients to be computed while it waits; rows go
    through `memory` if there is one. Raises ValueError when the experts do not divide.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        timed: Timed = untimed,
        later: DeferredGradients | None = None,
        memory: PeerMemory | None = None,
    ) -> None:
        self.link = Link(group, timed, later, memory)
        self.ranks = dist.get_world_size(group)
        if num_experts % self.ranks:
            raise ValueError(f"{num_experts} experts do not divide over the {self.ranks} ranks of the group")
        self.num_experts = num_experts
        self.num_local = num_experts // self.ranks
        first = dist.get_rank(group) * self.num_local
        self.experts = range(first, first + self.num_local)

    def dispatch(self, rows_TD: Tensor, expert_ids_TK: Tensor, fp8: bool = False) -> Trip:
        pairs = sort_pairs(expert_ids_TK, self.num_experts)
        copies = Copies.of(expert_ids_TK, self.ranks, self.num_local)
        announcement = Announcement(self.link, pairs.counts_E, copies.counts_P())

        def plan() -> tuple[Way, Tensor]:
            crossing, counts_L = Crossing.of(self.link, copies, announcement, rows_TD.device)
            return Way(pairs, expert_ids_TK.shape[1], fp8, crossing), counts_L

        return Trip(rows_TD, plan)


def dispatcher_for(experts: range, num_experts: int, given: Dispatcher | None) -> Dispatcher:
    """`given`, or the local dispatcher; ValueError where it does not fit the experts held here."""
    if given is None and experts != range(num_experts):
        raise ValueError(f"experts = {experts} is not all of {num_experts}: a dispatcher must reach the others")
    if isinstance(given, ProcessGroupDispatcher) and given.experts != experts:
        raise ValueError(f"experts = {experts}, but the dispatcher sends {given.experts} to this rank")
    return given or LocalDispatcher(num_experts)
