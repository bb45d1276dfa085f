"""Dispatchers: rows to experts, and sums of their results back, within a process and across a process group.

Expert e lives on rank e // (E / ranks). What lies between ranks is a `Crossing` (`crossing.py`); what arrives is spread
over the experts here (`spread.py`). The router's weights travel with the rows, and are factors of the experts' results,
so a rank has summed up what it sends home. In FP8 training that sum is rounded to BF16 once for each rank: this, and no
more of what is computed, depends on the number of ranks.

Notable: a departure and an arrival are two nodes of autograd's graph, so that what is computed between them, forward
and backward, hides the way (`interleave.py`). The backward of a crossing is a crossing the other way, so all ranks must
run the same layers in the same order; a rank that sends or receives no rows takes part all the same.

Shapes: T tokens, K slots, E experts, A rows that arrive, R rows at the experts here, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.deferred import DeferredGradients
from moray.models.expert_parallel.all_to_all import Link, Timed, untimed
from moray.models.expert_parallel.exchange import Arrivals, Crossing, ExchangeCrossing, Here, Load
from moray.models.expert_parallel.expert_permutation import Spread
from moray.models.expert_parallel.shared_memory import PeerMemory
from moray.models.expert_parallel.stages import Dispatcher, Routing

Departure = Callable[[Load], Arrivals]


class Way:
    """The way of one layer's rows, to the experts and home; their gradients go the same two ways."""

    def __init__(self, crossing: Crossing) -> None:
        self._crossing = crossing
        self._spread: Spread | None = None

    def counts_L(self) -> Tensor:  # noqa: N802
        """Rows of each expert here, int64, once rows have departed."""
        return self._crossing.counts_L()

    def to_experts(self, load: Load) -> Arrivals:
        """Rows [T, D] to where their experts are: rows [R, D]; with weights [T, K], which become [R], or without."""
        arrival = self._crossing.there(load)

        def arrived() -> Load:
            rows_AD, weights_AK = arrival()
            spread = self._spread_out()
            return Load(spread.rows(rows_AD), None if weights_AK is None else spread.weights(weights_AK))

        return arrived

    def home(self, load: Load) -> Arrivals:
        """The sum of each token's rows [R, D] to where it is: rows [T, D]; with a number for each, [R], which goes to
        the slot it belongs to, [T, K], or without."""
        rows_RD, weights_R = load
        spread = self._spread_out()
        return self._crossing.back(Load(spread.sums(rows_RD), None if weights_R is None else spread.slots(weights_R)))

    def _spread_out(self) -> Spread:
        if self._spread is None:
            self._spread = self._crossing.spread()
        return self._spread


class Trip:
    """A layer's dispatch (`layer.Dispatch`). What is not needed any more it lets go: the graph holds it up to the
    backward."""

    def __init__(self, rows_TD: Tensor, weights_TK: Tensor, crossing: Crossing) -> None:
        self._load: Load | None = Load(rows_TD, weights_TK)
        self._way = Way(crossing)
        # Between a departure and its arrival the graph has an edge, and there is no tensor yet: this stands for it.
        self._ticket: Tensor | None = None
        self._arrival: Arrivals | None = None

    def send(self) -> None:
        assert self._load is not None
        load, self._load = self._load, None
        self._ticket = _Depart.apply(self, self._way.to_experts, *load)  # type: ignore[no-untyped-call]

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        ticket, self._ticket = self._ticket, None
        rows_RD, weights_R = _Arrive.apply(ticket, self, self._way.home)  # type: ignore[no-untyped-call]
        return rows_RD, weights_R, self._way.counts_L()

    def send_back(self, rows_RD: Tensor) -> None:
        self._ticket = _Depart.apply(self, self._way.home, rows_RD, None)  # type: ignore[no-untyped-call]

    def home(self) -> Tensor:
        ticket, self._ticket = self._ticket, None
        rows_TD: Tensor = _Arrive.apply(ticket, self, self._way.to_experts)[0]  # type: ignore[no-untyped-call]
        return rows_TD

    def under_way(self, arrival: Arrivals) -> None:
        """Remembers the one transfer that this trip now waits for."""
        self._arrival = arrival

    def take(self) -> Load:
        """Waits for it; what arrived."""
        assert self._arrival is not None
        arrival, self._arrival = self._arrival, None
        return arrival()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, departure: Departure, rows_XD: Tensor, weights: Tensor | None) -> Tensor:
        ctx.trip = trip
        trip.under_way(departure(Load(rows_XD, weights)))
        return rows_XD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.trip.take()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: Trip, gradients_departure: Departure) -> tuple[Tensor | None, ...]:
        ctx.trip, ctx.departure = trip, gradients_departure
        return tuple(trip.take())

    @staticmethod
    def backward(ctx: Any, d_rows_XD: Tensor, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.trip.under_way(ctx.departure(Load(d_rows_XD, d_weights)))
        return d_rows_XD.new_empty(0), None, None


class LocalDispatcher:
    """All experts are here."""

    def dispatch(self, rows_TD: Tensor, routing: Routing, fp8: bool = False) -> Trip:
        return Trip(rows_TD, routing.weights_TK, Here(routing, fp8))


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
        local = num_experts // self.ranks
        first = dist.get_rank(group) * local
        self.experts = range(first, first + local)

    def dispatch(self, rows_TD: Tensor, routing: Routing, fp8: bool = False) -> Trip:
        return Trip(rows_TD, routing.weights_TK, self.crossing(routing, fp8))

    def crossing(self, routing: Routing, fp8: bool) -> Crossing:
        """How the rows of one layer cross."""
        return ExchangeCrossing(self.link, routing, self.experts, self.ranks, fp8)


def dispatcher_for(experts: range, num_experts: int, given: Dispatcher | None) -> Dispatcher:
    """`given`, or the local dispatcher; ValueError where it does not fit the experts held here."""
    if given is None and experts != range(num_experts):
        raise ValueError(f"experts = {experts} is not all of {num_experts}: a dispatcher must reach the others")
    if isinstance(given, ProcessGroupDispatcher) and given.experts != experts:
        raise ValueError(f"experts = {experts}, but the dispatcher sends {given.experts} to this rank")
    return given or LocalDispatcher()
