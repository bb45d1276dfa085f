"""One layer's exchange of rows between ranks: dispatch to the ranks of the experts, combine of partial sums of results.

Rows go along a route (`routes.py`). In the forward pass dispatch also sends the ids of the token's experts and the
router's weights. In FP8 training dispatch sends FP8 (`kernels/wire.py`), and gives what it received as `Fp8Rows`:
tokens in the forward pass, gradients of results in the backward pass. Combine returns one row per received row, in the
rows' own dtype (DeepSeek-V3 §3.3.3), and sums them on the token's rank; in two hops, also on the rank that forwarded
the token.

Shapes: T tokens of this rank, A received rows, K slots, E experts, L local experts, D hidden size, N bytes of metadata.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moray.kernels.wire import packed_width, quantize_rows, unpack_rows
from moray.models.expert_parallel.all_to_all import PendingRows
from moray.models.expert_parallel.expert_permutation import ExpertPermutation, expert_permutation
from moray.models.expert_parallel.routes import Payload, PendingPayload, Route, as_bytes, as_numbers
from moray.models.expert_parallel.stages import Routing


class Exchange(Protocol):
    """The exchange of one layer. The first dispatch sends the weights. The backward pass uses the same two directions,
    so later calls may omit weights."""

    def start_dispatch(self, payload: Payload) -> PendingPayload:
        """Starts sending tokens to the ranks of their experts."""

    def start_combine(self, payload: Payload) -> PendingPayload:
        """Starts returning one row per received row, in their order; the token's rank sums them."""

    def counts_L(self) -> Tensor:  # noqa: N802
        """Rows of each local expert, int64, once a dispatch has started. On the host if the host has received them."""

    def permutation(self) -> ExpertPermutation:
        """The permutation of received rows by local expert, once a dispatch with weights has been received."""


@dataclass(frozen=True)
class ReadyPayload:
    """A payload that was not sent."""

    payload: Payload

    def wait(self) -> Payload:
        return self.payload


class LocalExchange:
    """An exchange with all experts local, which sends nothing. Rows are still rounded to FP8, so that results depend as
    little as possible on the number of ranks."""

    def __init__(self, routing: Routing, fp8: bool) -> None:
        self._ids_TK, self._counts_E, self._fp8 = routing.ids_TK, routing.counts_E, fp8

    def start_dispatch(self, payload: Payload) -> PendingPayload:
        rows_TD, weights_TK = payload
        if self._fp8:
            rows_TD = quantize_rows(rows_TD)
        return ReadyPayload(Payload(rows_TD, weights_TK))

    def start_combine(self, payload: Payload) -> PendingPayload:
        return ReadyPayload(payload)

    def counts_L(self) -> Tensor:  # noqa: N802
        return self._counts_E

    def permutation(self) -> ExpertPermutation:
        return expert_permutation(self._ids_TK, len(self._counts_E), self._ids_TK.numel(), self._fp8)


class RoutedExchange:
    """An exchange along a `Route`. Rows carry metadata, expert ids and weights, in the first dispatch."""

    def __init__(self, route: Route, ids_TK: Tensor, experts: range, fp8: bool) -> None:
        self._route, self._ids_TK, self._experts, self._fp8 = route, ids_TK, experts, fp8
        self._ids_AK: Tensor | None = None

    def start_dispatch(self, payload: Payload) -> PendingPayload:
        rows_TD, weights_TK = payload
        pending = self._route.start_dispatch(rows_TD, self._metadata(rows_TD, weights_TK), self._fp8)
        slots, dtype = (0, rows_TD.dtype) if weights_TK is None else (weights_TK.shape[1], weights_TK.dtype)
        return _PendingDispatch(self, pending, rows_TD.shape[1], rows_TD.dtype, slots, dtype, self._fp8)

    def start_combine(self, payload: Payload) -> PendingPayload:
        return self._route.start_combine(payload)

    def counts_L(self) -> Tensor:  # noqa: N802
        return self._route.counts_L()

    def permutation(self) -> ExpertPermutation:
        assert self._ids_AK is not None, "a dispatch with weights comes first"
        return expert_permutation(self._ids_AK, len(self._experts), int(self.counts_L().sum()), self._fp8)

    def received(self, ids_AK: Tensor) -> None:
        """Sets the global expert ids of the received rows."""
        self._route.check(ids_AK)
        local_AK = ids_AK - self._experts.start
        self._ids_AK = torch.where((local_AK >= 0) & (local_AK < len(self._experts)), local_AK, -1)

    def _metadata(self, rows_TD: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Bytes sent with the rows, uint8 [T, N]: expert ids, then weights."""
        if weights_TK is None:
            return rows_TD.new_empty((len(rows_TD), 0), dtype=torch.uint8)
        return torch.cat((as_bytes(self._ids_TK.int()), as_bytes(weights_TK)), dim=1)


@dataclass(frozen=True)
class _PendingDispatch:
    """Received bytes: rows of `columns` numbers, then `slots` expert ids and weights."""

    exchange: RoutedExchange
    pending: PendingRows
    columns: int
    dtype: torch.dtype
    slots: int
    weights_dtype: torch.dtype
    fp8: bool

    def wait(self) -> Payload:
        bytes_AX = self.pending.wait()
        width = packed_width(self.columns) if self.fp8 else self.columns * self.dtype.itemsize
        row_bytes = bytes_AX[:, :width]
        rows_AD = unpack_rows(row_bytes, self.columns, self.dtype) if self.fp8 else as_numbers(row_bytes, self.dtype)
        if not self.slots:
            return Payload(rows_AD, None)
        ids_bytes, weights_bytes = bytes_AX[:, width:].tensor_split([self.slots * torch.int32.itemsize], dim=1)
        self.exchange.received(as_numbers(ids_bytes, torch.int32))
        return Payload(rows_AD, as_numbers(weights_bytes, self.weights_dtype))
