"""The protocol of a layer: attend_route -> dispatch -> experts -> combine -> aggregate.

The five stages are separate calls so that a schedule may own the two that communicate (dispatch and combine) and
run another micro-batch's compute under them; `run_layer` is the plain schedule. A `Dispatcher` moves rows between
tokens and experts; the layer does not know whether the experts are in this process.

Shapes: B batch, T tokens (of a row, or of the flattened batch where there is no B), K slots, E experts, R rows, D
hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from moray.models.recompute import Recompute

A_contra = TypeVar("A_contra", contravariant=True)


@dataclass(frozen=True)
class Routing:
    """Where a token's row goes. ids_TK int64; weights_TK the factors of the sum; counts_E int64, pairs per expert.

    balance: the layer's sequence-wise balance loss, a scalar (`kernels.router`); None outside training.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    balance: Tensor | None


class Handle(Protocol):
    """What a dispatch brought to this rank's experts; whoever made it can take the results back.

    rows_RD: rows sorted by local expert. counts_E: int64, rows per *local* expert; on the host where the dispatcher had
    to bring it there.
    """

    @property
    def rows_RD(self) -> Tensor: ...  # noqa: N802
    @property
    def counts_E(self) -> Tensor: ...  # noqa: N802


class Dispatcher(Protocol):
    """Brings rows to experts and results back. One combine per handle, and the same calls in the same order on every
    rank, since each may be a collective."""

    def dispatch(self, rows_TD: Tensor, expert_ids_TK: Tensor, fp8: bool = False) -> Handle:
        """Sends row t to the experts `expert_ids_TK[t]`; with `fp8`, in FP8, and so the results' gradients too."""
        ...

    def combine(self, handle: Handle, rows_RD: Tensor) -> Tensor:
        """Brings the experts' results home: rows_TKD, unweighted, slot by slot."""
        ...


@dataclass(frozen=True)
class Attended:
    """A layer after its attention: the residual stream, the normalised rows for the experts, their routing.

    routing is None in a layer without experts. recompute: what the layer does not hold for its backward.
    """

    residual_BTD: Tensor
    rows_TD: Tensor
    routing: Routing | None
    recompute: Recompute


class Layer(Protocol[A_contra]):
    """The stages of one layer. `attend` runs the layer's attention on normalised rows (training or cached)."""

    def attend_route(self, x_BTD: Tensor, attend: A_contra) -> Attended: ...
    def dispatch(self, attended: Attended) -> Handle: ...
    def experts(self, handle: Handle) -> Tensor: ...
    def combine(self, handle: Handle, rows_RD: Tensor) -> Tensor: ...
    def aggregate(self, attended: Attended, rows_TKD: Tensor | None) -> Tensor: ...


Attend = TypeVar("Attend", bound=Callable[..., Tensor])


def run_layer(layer: Layer[Attend], x_BTD: Tensor, attend: Attend) -> tuple[Tensor, Tensor | None]:
    """Runs the stages one after the other; returns the layer's output and its balance loss, if it has one."""
    attended = layer.attend_route(x_BTD, attend)
    if attended.routing is None:
        return layer.aggregate(attended, None), None
    handle = layer.dispatch(attended)
    rows_TKD = layer.combine(handle, layer.experts(handle))
    return layer.aggregate(attended, rows_TKD), attended.routing.balance
