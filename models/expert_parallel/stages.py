"""The stages of a layer: attend and route, dispatch, experts, combine, aggregate.

The stages are separate calls so that a schedule can run other computation while rows are in flight; `layer_parts` is
that schedule. A `Dispatcher` exchanges rows between tokens and experts. The layer does not depend on whether the
experts are in this process.

Shapes: B batch, T tokens (of a row, or of the flattened batch without B), K slots, E experts, L local experts, R rows,
D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from moray.models.expert_parallel.interleave import Parts
from moray.models.recompute import Recompute

A_contra = TypeVar("A_contra", contravariant=True)


@dataclass(frozen=True)
class RoutingContext:
    """Information for an MoE layer about the B x T positions of a training batch. By default all positions are equal.

    token_positions_R: int64, the positions that hold a token, if there is padding; padding is sent to no expert and not
    counted. counted_T: bool, the positions whose pairs count for the load. weights_B: each sequence's weight in the
    balance loss, which is later divided by their sum. forced_ids_TK: int64, the experts of each position, replacing the
    router's choice. run: "first" and "again" are the two runs of a layer that the backward recomputes, the first
    without a graph; only the first counts.
    """

    token_positions_R: Tensor | None = None
    counted_T: Tensor | None = None
    weights_B: Tensor | None = None
    forced_ids_TK: Tensor | None = None
    run: Literal["only", "first", "again"] = "only"

    def gather(self, values_TX: Tensor) -> Tensor:
        """The values at positions with a token: [R, ...]."""
        return values_TX if self.token_positions_R is None else values_TX.index_select(0, self.token_positions_R)

    def scatter(self, rows_RD: Tensor, positions: int) -> Tensor:
        """The inverse of `gather`: [T, D], zero at padding."""
        if self.token_positions_R is None:
            return rows_RD
        return rows_RD.new_zeros(positions, rows_RD.shape[1]).index_copy(0, self.token_positions_R, rows_RD)

    def counted(self, positions: int, device: torch.device) -> Tensor | None:
        """bool [T], the positions that count. None if all do."""
        if self.token_positions_R is None:
            return self.counted_T
        real_T = torch.zeros(positions, dtype=torch.bool, device=device)
        real_T = real_T.index_fill(0, self.token_positions_R, value=True)
        return real_T if self.counted_T is None else real_T & self.counted_T


DEFAULT_CONTEXT = RoutingContext()


@dataclass(frozen=True)
class Routing:
    """The routing of tokens, without padding. ids_TK int64; weights_TK, factors of the experts' results; counts_E
    int64, the number of pairs of each expert.

    balance: the layer's sequence-wise balance loss, a scalar (`kernels.router`); None outside training.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    balance: Tensor | None


class ExpertRows(NamedTuple):
    """What the local experts compute. rows [R, D], sorted by expert; weights [R], the router's, by which they multiply
    their results; counts [L], int64, the rows of each expert, on the host if the dispatcher needed them there.

    offsets: int32 [L + 1], where each expert's rows begin and the last ones end, if they are `Fp8Rows`, which begin at
    multiples of 128. None if nothing is between them.
    """

    rows_RD: Tensor
    weights_R: Tensor
    counts_L: Tensor
    offsets_L1: Tensor | None = None


class DispatchHandle(Protocol):
    """The exchange of one layer's rows. Its methods are called in this order, once each."""

    def start_dispatch(self) -> None:
        """Starts sending the rows to their experts."""

    def wait_dispatch(self) -> ExpertRows:
        """Waits for the rows of the local experts."""

    def start_combine(self, rows_RD: Tensor) -> None:
        """Starts returning the experts' results, already multiplied by the weights."""

    def wait_combine(self) -> Tensor:
        """Waits for the sums of the results for this rank's tokens: rows_TD."""


class Dispatcher(Protocol):
    """Exchanges rows between tokens and experts. Every rank must make the same calls in the same order, because each
    may be a collective."""

    def dispatch(self, rows_TD: Tensor, routing: Routing, fp8: bool = False, layer: int = 0) -> DispatchHandle:
        """Prepares to send row t to the experts `routing.ids_TK[t]`, and starts sending their ranks the row counts.
        With `fp8`, rows are sent in FP8, and so are the gradients of the results. `layer` is named in errors."""
        ...


@dataclass(frozen=True)
class Attended:
    """A layer's state after its attention: the residual stream, the normalized hidden states for the experts, their
    routing.

    routing is None in a layer without experts. recompute: the context of tensors that the backward recomputes. context:
    the batch's routing context.
    """

    residual_BTD: Tensor
    rows_TD: Tensor
    routing: Routing | None
    recompute: Recompute
    context: RoutingContext


class Layer(Protocol[A_contra]):
    """The stages of one layer. `attend` runs the layer's attention on normalized hidden states (training or cached).

    `local` processes every token: the dense MLP of a layer without experts, or the shared expert, or None.
    """

    def attend_route(self, x_BTD: Tensor, attend: A_contra, context: RoutingContext) -> Attended: ...
    def dispatch(self, attended: Attended) -> DispatchHandle: ...
    def local(self, attended: Attended) -> Tensor | None: ...
    def experts(self, rows: ExpertRows) -> Tensor: ...
    def aggregate(self, attended: Attended, *parts_TD: Tensor | None) -> Tensor: ...


Attend = TypeVar("Attend", bound=Callable[..., Tensor])


def layer_parts(
    layer: Layer[Attend], x_BTD: Tensor, attend: Attend, context: RoutingContext = DEFAULT_CONTEXT
) -> Parts[tuple[Tensor, Routing | None]]:
    """Runs a layer; returns its output and its routing, if it has experts. Yields while rows are in flight, and after a
    layer without experts.

    The shared expert is computed while the ranks exchange the row counts.
    """
    attended = layer.attend_route(x_BTD, attend, context)
    if attended.routing is None:
        out_BTD = layer.aggregate(attended, layer.local(attended))
        yield None  # micro-batches stay at most one layer apart, so that few layers' weights are in use
        return out_BTD, None
    handle = layer.dispatch(attended)
    local_TD = layer.local(attended)
    handle.start_dispatch()
    yield None
    handle.start_combine(layer.experts(handle.wait_dispatch()))
    yield None
    routed_TD = context.scatter(handle.wait_combine(), len(attended.rows_TD))
    return layer.aggregate(attended, local_TD, routed_TD), attended.routing
