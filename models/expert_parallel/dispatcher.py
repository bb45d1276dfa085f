"""Dispatchers: send tokens to experts and combine their results, within a process or across a process group.

The stages of one layer, in the order of the forward pass, and the tensor after each; the backward pass runs them in
reverse and sends gradients through the same two exchanges in the other direction:

    stage                            tensor                  where
    1 SendPlan.gather                sent [C, D]             rank of the token; FP8 in FP8 training
    2 AllToAll.start    } dispatch                           in two hops between nodes (`two_hop.py`)
    3 PendingRows.wait  }            received [A, D]         rank of the expert; with ids and weights
    4 ExpertPermutation.expand       at experts [R, D]       by expert; FP8 as received, padded, in FP8 training
      (experts: results times the router's weights)  [R, D]
    5 ExpertPermutation.reduce       partial sums [A, D]     rank of the expert; BF16 in FP8 training
    6 AllToAll.start    } combine
    7 PendingRows.wait  }            returned [C, D]         rank of the token
    8 SendPlan.reduce                output [T, D]

Stages 1 and 8 are skipped if all experts are local. Shared memory does stage 1, quantization and stage 2 in one pass
(`kernels/push.py`). Expert e is on rank e // (E / ranks). Dispatch sends the router's weights with the rows, and they
multiply the experts' results, so each rank returns one sum per row. In FP8 and BF16 training that sum is rounded to
BF16 once per rank, and in two hops the sum of a node's ranks once more. Only these roundings depend on the number of
ranks, and on how nodes hold them.

Notable: the start and the wait of an exchange are two nodes of autograd's graph. So computation between them, forward
and backward, hides the transfer (`interleave.py`). All ranks must run the same layers in the same order; a rank that
sends or receives no rows must still take part.

Shapes: T tokens, K slots, E experts, C sent rows, A received rows, R rows at the local experts, D hidden size.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.all_to_all import AllToAll, Timed, untimed
from moray.models.expert_parallel.exchange import Exchange, LocalExchange, RoutedExchange
from moray.models.expert_parallel.exchange_check import ExchangeCheck
from moray.models.expert_parallel.expert_permutation import ExpertPermutation
from moray.models.expert_parallel.routes import DirectRoute, LayerRouting, Payload, PendingPayload, Route
from moray.models.expert_parallel.shared_memory import PeerMemory
from moray.models.expert_parallel.stages import Dispatcher, ExpertRows, Routing
from moray.models.expert_parallel.two_hop import Nodes, TwoHopRoute

Direction = Literal["dispatch", "combine"]
_GRADIENT: dict[Direction, Direction] = {"dispatch": "combine", "combine": "dispatch"}


class LayerDispatch:
    """Implements `stages.DispatchHandle`. It frees tensors after use, because the graph keeps the handle until the
    backward pass."""

    def __init__(self, rows_TD: Tensor, weights_TK: Tensor, exchange: Exchange) -> None:
        self._payload: Payload | None = Payload(rows_TD, weights_TK)
        self._exchange = exchange
        self._permutation: ExpertPermutation | None = None
        # An empty tensor for the graph's edge between a start and its wait, when the result does not exist yet.
        self._edge: Tensor | None = None
        self._pending: tuple[Direction, PendingPayload] | None = None

    def start_dispatch(self) -> None:
        assert self._payload is not None
        payload, self._payload = self._payload, None
        self._edge = _Start.apply(self, "dispatch", *payload)  # type: ignore[no-untyped-call]

    def wait_dispatch(self) -> ExpertRows:
        edge, self._edge = self._edge, None
        rows_RD, weights_R = _Wait.apply(edge, self, "dispatch")  # type: ignore[no-untyped-call]
        return ExpertRows(rows_RD, weights_R, self._exchange.counts_L(), self._order().offsets_L1)

    def start_combine(self, rows_RD: Tensor) -> None:
        self._edge = _Start.apply(self, "combine", rows_RD, None)  # type: ignore[no-untyped-call]

    def wait_combine(self) -> Tensor:
        edge, self._edge = self._edge, None
        rows_TD: Tensor = _Wait.apply(edge, self, "combine")[0]  # type: ignore[no-untyped-call]
        return rows_TD

    def start(self, direction: Direction, payload: Payload) -> None:
        """Starts one exchange of tokens [T, D], with weights [T, K] or without, or of expert rows [R, D] with [R]."""
        if direction == "dispatch":
            pending = self._exchange.start_dispatch(payload)
        else:
            rows_RD, weights_R = payload
            order = self._order()
            slots_AK = None if weights_R is None else order.to_slots(weights_R)
            pending = self._exchange.start_combine(Payload(order.reduce(rows_RD), slots_AK))
        self._pending = direction, pending

    def finish(self) -> Payload:
        """Waits for the last started exchange. Dispatch gives expert rows, combine gives tokens."""
        assert self._pending is not None
        (direction, pending), self._pending = self._pending, None
        payload = pending.wait()
        if direction == "combine":
            return payload
        rows_AD, weights_AK = payload
        order = self._order()
        return Payload(order.expand(rows_AD), None if weights_AK is None else order.expand_weights(weights_AK))

    def _order(self) -> ExpertPermutation:
        if self._permutation is None:
            self._permutation = self._exchange.permutation()
        return self._permutation


class _Start(torch.autograd.Function):
    """Starts an exchange; its backward waits for the exchange of the gradients."""

    @staticmethod
    def forward(
        ctx: Any, handle: LayerDispatch, direction: Direction, rows_XD: Tensor, weights: Tensor | None
    ) -> Tensor:
        ctx.handle = handle
        handle.start(direction, Payload(rows_XD, weights))
        return rows_XD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.handle.finish()


class _Wait(torch.autograd.Function):
    """Waits for an exchange; its backward starts the exchange of the gradients, in the other direction."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, handle: LayerDispatch, direction: Direction) -> tuple[Tensor | None, ...]:
        ctx.handle, ctx.direction = handle, _GRADIENT[direction]
        return tuple(handle.finish())

    @staticmethod
    def backward(ctx: Any, d_rows_XD: Tensor, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.handle.start(ctx.direction, Payload(d_rows_XD, d_weights))
        return d_rows_XD.new_empty(0), None, None


class LocalDispatcher:
    """A dispatcher for local experts only."""

    def dispatch(self, rows_TD: Tensor, routing: Routing, fp8: bool = False, layer: int = 0) -> LayerDispatch:
        return LayerDispatch(rows_TD, routing.weights_TK, LocalExchange(routing, fp8))


class ProcessGroupDispatcher:
    """A dispatcher for experts distributed evenly over the ranks of a torch.distributed group.

    `experts`: the range that this rank must hold. `check`: compares what all exchanges deliver. `deferred`: weight
    gradients to compute while waiting. `memory`: shared memory of the group's ranks, if rows are sent through it.
    `nodes`: if rows are sent in two hops. Raises ValueError if the experts are not divisible by the ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        timed: Timed = untimed,
        deferred: DeferredGradients | None = None,
        memory: PeerMemory | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self.check = ExchangeCheck()
        self._nodes = nodes
        self.all_to_all = AllToAll(group, timed, deferred, memory)
        self.ranks = dist.get_world_size(group)
        if num_experts % self.ranks:
            raise ValueError(f"{num_experts} experts are not divisible by the {self.ranks} ranks of the group")
        self.num_experts = num_experts
        local = num_experts // self.ranks
        first = dist.get_rank(group) * local
        self.experts = range(first, first + local)

    def dispatch(self, rows_TD: Tensor, routing: Routing, fp8: bool = False, layer: int = 0) -> LayerDispatch:
        return LayerDispatch(rows_TD, routing.weights_TK, self.exchange(routing, fp8, layer))

    def exchange(self, routing: Routing, fp8: bool, layer: int) -> Exchange:
        """The exchange of one layer."""
        of_layer = LayerRouting(layer, routing.ids_TK, routing.counts_E, self.experts)
        route: Route
        if self._nodes is None:
            route = DirectRoute(self.all_to_all, of_layer, self.check)
        else:
            route = TwoHopRoute(self.all_to_all, self._nodes, of_layer, self.check)
        return RoutedExchange(route, routing.ids_TK, self.experts, fp8)


def dispatcher_for(experts: range, num_experts: int, given: Dispatcher | None) -> Dispatcher:
    """Returns `given`, or the local dispatcher. Raises ValueError if it does not match this rank's experts."""
    if given is None and experts != range(num_experts):
        raise ValueError(f"experts = {experts} is not all of {num_experts}: a dispatcher must reach the others")
    if isinstance(given, ProcessGroupDispatcher) and given.experts != experts:
        raise ValueError(f"experts = {experts}, but the dispatcher sends {given.experts} to this rank")
    return given or LocalDispatcher()
