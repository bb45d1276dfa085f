"""The stages of a layer: attend and route, dispatch, experts, combine, aggregate.

They are separate calls so that a schedule may run other compute while rows are in flight; `layer_parts` is that
schedule. A `Dispatcher` moves rows between tokens and experts; the layer does not know whether the experts are in this
process.

Shapes: B batch, T tokens (of a row, or of the flattened batch where there is no B), K slots, E experts, L local
experts, R rows, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from moray.models.expert_parallel.interleave import Parts
from moray.models.recompute import Recompute

A_contra = TypeVar("A_contra", contravariant=True)


@dataclass(frozen=True)
class RoutingContext:
    """What a layer of experts is to know of the B x T places of a batch in training. By default all are alike.

    token_positions_R: int64, the places that hold a token, where some are padding; no other is sent to an expert, nor counted.
    counted_T: bool, the places whose pairs count for the load. weights_B: each sequence's weight in the balance loss,
    which is then to be divided by their sum. forced_ids_TK: int64, the experts that each place's token goes to, instead of
    those that the layer's router would choose.
    """

    token_positions_R: Tensor | None = None
    counted_T: Tensor | None = None
    weights_B: Tensor | None = None
    forced_ids_TK: Tensor | None = None

    def gather(self, values_TX: Tensor) -> Tensor:
        """Of the values at all places those at places with a token: [R, ...]."""
        return values_TX if self.token_positions_R is None else values_TX.index_select(0, self.token_positions_R)

    def scatter(self, rows_RD: Tensor, positions: int) -> Tensor:
        """The inverse of `gather`: [T, D], zero at padding."""
        if self.token_positions_R is None:
            return rows_RD
        return rows_RD.new_zeros(positions, rows_RD.shape[1]).index_copy(0, self.token_positions_R, rows_RD)

    def counted(self, positions: int, device: torch.device) -> Tensor | None:
        """bool [T], the places that count; None: all."""
        if self.token_positions_R is None:
            return self.counted_T
        real_T = torch.zeros(positions, dtype=torch.bool, device=device).index_fill(0, self.token_positions_R, value=True)
        return real_T if self.counted_T is None else real_T & self.counted_T


DEFAULT_CONTEXT = RoutingContext()


@dataclass(frozen=True)
class Routing:
    """Where the rows of tokens go, padding left out. ids_TK int64; weights_TK, factors of the experts' results;
    counts_E int64, how many pairs go to each expert.

    balance: the layer's sequence-wise balance loss, a scalar (`kernels.router`); None outside training.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    balance: Tensor | None


class DispatchHandle(Protocol):
    """The exchange of one layer's rows. Its calls come in this order, once each."""

    def start_dispatch(self) -> None:
        """Starts to send the rows to their experts."""

    def wait_dispatch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the rows of the local experts: rows_RD, sorted by expert, the router's weight of each, weights_R,
        and counts_L, int64, the rows of each *local* expert; on the host where the dispatcher had to bring it there."""

    def start_combine(self, rows_RD: Tensor) -> None:
        """Starts to return the experts' results, which are multiplied by the weights."""

    def wait_combine(self) -> Tensor:
        """Waits for the sums of these for this rank's tokens: rows_TD."""


class Dispatcher(Protocol):
    """Moves rows to experts and results back. Every rank makes the same calls in the same order, since each may be a
    collective."""

    def dispatch(self, rows_TD: Tensor, routing: Routing, fp8: bool = False) -> DispatchHandle:
        """Prepares to send row t to the experts `routing.ids_TK[t]`, and starts to tell their ranks how many rows will
        come. With `fp8`, rows are sent in FP8, and so are the gradients of the results."""
        ...


@dataclass(frozen=True)
class Attended:
    """A layer after its attention: the residual stream, the normalised rows for the experts, their routing.

    routing is None in a layer without experts. recompute: what the layer does not hold for its backward. places: of the
    batch, and which of them are routed.
    """

    residual_BTD: Tensor
    rows_TD: Tensor
    routing: Routing | None
    recompute: Recompute
    context: RoutingContext


class Layer(Protocol[A_contra]):
    """The stages of one layer. `attend` runs the layer's attention on normalised rows (training or cached).

    `local` is what every token visits: the dense MLP of a layer without experts, or the shared expert, or None.
    """

    def attend_route(self, x_BTD: Tensor, attend: A_contra, context: RoutingContext) -> Attended: ...
    def dispatch(self, attended: Attended) -> DispatchHandle: ...
    def local(self, attended: Attended) -> Tensor | None: ...
    def experts(self, rows_RD: Tensor, weights_R: Tensor, counts_L: Tensor) -> Tensor: ...
    def aggregate(self, attended: Attended, *parts_TD: Tensor | None) -> Tensor: ...


Attend = TypeVar("Attend", bound=Callable[..., Tensor])


def layer_parts(
    layer: Layer[Attend], x_BTD: Tensor, attend: Attend, context: RoutingContext = DEFAULT_CONTEXT
) -> Parts[tuple[Tensor, Routing | None]]:
    """The layer's output and its routing, if it has experts. Yields while rows are in flight.

    The shared expert is computed while the ranks exchange how many rows will come.
    """
    attended = layer.attend_route(x_BTD, attend, context)
    if attended.routing is None:
        return layer.aggregate(attended, layer.local(attended)), None
    handle = layer.dispatch(attended)
    local_TD = layer.local(attended)
    handle.start_dispatch()
    yield
    handle.start_combine(layer.experts(*handle.wait_dispatch()))
    yield
    routed_TD = context.scatter(handle.wait_combine(), len(attended.rows_TD))
    return layer.aggregate(attended, local_TD, routed_TD), attended.routing
