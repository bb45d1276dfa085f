"""One layer's exchange of rows between ranks: dispatch to the ranks of the experts, combine of partial sums of results.

Dispatch sends each token once to each rank that holds any of its experts (`send_plan.py`). In the forward pass it also
sends the ids of the token's experts and the router's weights. In FP8 training dispatch sends FP8 (`kernels/wire.py`):
tokens in the forward pass, gradients of results in the backward pass. Combine returns one row per received row, in the
rows' own dtype (DeepSeek-V3 §3.3.3), and sums them on the token's rank.

Shapes: T tokens of this rank, A received rows, K slots, P ranks, E experts, L local experts, C sent rows, D hidden
size, N bytes of metadata.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moray.kernels.util.device import runtime
from moray.kernels.wire import pack_rows, packed_width, unpack_rows
from moray.models.expert_parallel.all_to_all import AllToAll, PendingRows
from moray.models.expert_parallel.expert_permutation import ExpertPermutation
from moray.models.expert_parallel.send_plan import SendPlan
from moray.models.expert_parallel.stages import Routing


class Payload(NamedTuple):
    """The tensors of an exchange: rows, [T, D] or [A, D], and a number for each of their slots, [T, K] or [A, K], or
    None."""

    rows: Tensor
    weights: Tensor | None


class PendingPayload(Protocol):
    """A payload in flight."""

    def wait(self) -> Payload:
        """Blocks until the payload is received; called once."""


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
            rows_TD = unpack_rows(pack_rows(rows_TD), rows_TD.shape[1], rows_TD.dtype)
        return ReadyPayload(Payload(rows_TD, weights_TK))

    def start_combine(self, payload: Payload) -> PendingPayload:
        return ReadyPayload(payload)

    def counts_L(self) -> Tensor:  # noqa: N802
        return self._counts_E

    def permutation(self) -> ExpertPermutation:
        return ExpertPermutation.of(self._ids_TK, len(self._counts_E), self._ids_TK.numel())


class RowCounts(NamedTuple):
    """Rows sent to each rank and received from each, on the host; counts_L: rows of each local expert, int64."""

    send: list[int]
    recv: list[int]
    counts_L: Tensor


class CountExchange:
    """A small all-to-all ahead of the rows, because an exchange of rows needs its counts on the host.

    On a GPU the received counts are copied to the host on a separate stream, so reading them does not wait for kernels
    launched in the meantime.
    """

    def __init__(self, all_to_all: AllToAll, counts_E: Tensor, send_counts_P: Tensor) -> None:
        """counts_E: pairs of this rank for each expert of all ranks."""
        self._sent_PX = torch.cat((counts_E.view(len(send_counts_P), -1), send_counts_P.unsqueeze(1)), dim=1)
        self._pending = all_to_all.start(self._sent_PX, None, None)
        self._side = runtime(counts_E.device).side_stream()

    def wait(self) -> RowCounts:
        with self._side:
            both = torch.stack((self._sent_PX, self._pending.wait())).cpu()  # the only sync, of this stream alone
        return RowCounts(both[0, :, -1].tolist(), both[1, :, -1].tolist(), both[1, :, :-1].sum(0))


class AllToAllExchange:
    """An exchange by `AllToAll`: first counts, then the bytes of rows with their metadata."""

    def __init__(self, all_to_all: AllToAll, routing: Routing, experts: range, ranks: int, fp8: bool) -> None:
        self._all_to_all, self._ids_TK, self.experts, self.fp8 = all_to_all, routing.ids_TK, experts, fp8
        self._plan = SendPlan.of(routing.ids_TK, ranks, len(experts))
        self._pending_counts = CountExchange(all_to_all, routing.counts_E, self._plan.send_counts())
        self._counts: RowCounts | None = None
        self._ids_AK: Tensor | None = None

    def start_dispatch(self, payload: Payload) -> PendingPayload:
        if self._counts is None:
            self._counts = self._pending_counts.wait()
        send, recv, _ = self._counts
        rows_TD, weights_TK = payload
        metadata_TN = self._metadata(rows_TD, weights_TK)
        if self.fp8 and self._all_to_all.memory is not None:
            pending = self._all_to_all.start_fp8(rows_TD, metadata_TN, self._plan.sent_PT, send, recv)
        else:
            bytes_TX = torch.cat((pack_rows(rows_TD) if self.fp8 else _as_bytes(rows_TD), metadata_TN), dim=1)
            pending = self._all_to_all.start(self._plan.gather(bytes_TX, sum(send)), send, recv)
        slots, dtype = (0, rows_TD.dtype) if weights_TK is None else (weights_TK.shape[1], weights_TK.dtype)
        return _PendingDispatch(self, pending, rows_TD.shape[1], rows_TD.dtype, slots, dtype)

    def start_combine(self, payload: Payload) -> PendingPayload:
        assert self._counts is not None
        send, recv, _ = self._counts
        rows_AD, weights_AK = payload
        like = rows_AD.new_empty(0, rows_AD.shape[1])  # not the rows themselves, which are freed once sent
        if weights_AK is None:
            return _PendingCombine(self._plan, self._all_to_all.start(rows_AD, recv, send), like, None)
        bytes_AX = torch.cat((_as_bytes(rows_AD), _as_bytes(weights_AK)), dim=1)
        return _PendingCombine(self._plan, self._all_to_all.start(bytes_AX, recv, send), like, weights_AK.dtype)

    def counts_L(self) -> Tensor:  # noqa: N802
        assert self._counts is not None, "a dispatch comes first"
        return self._counts.counts_L

    def permutation(self) -> ExpertPermutation:
        assert self._ids_AK is not None, "a dispatch with weights comes first"
        return ExpertPermutation.of(self._ids_AK, len(self.experts), int(self.counts_L().sum()))

    def received(self, ids_AK: Tensor) -> None:
        """Sets the global expert ids of the received rows."""
        local_AK = ids_AK - self.experts.start
        self._ids_AK = torch.where((local_AK >= 0) & (local_AK < len(self.experts)), local_AK, -1)

    def _metadata(self, rows_TD: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Bytes sent with the rows, uint8 [T, N]: expert ids, then weights."""
        if weights_TK is None:
            return rows_TD.new_empty((len(rows_TD), 0), dtype=torch.uint8)
        return torch.cat((_as_bytes(self._ids_TK.int()), _as_bytes(weights_TK)), dim=1)


@dataclass(frozen=True)
class _PendingDispatch:
    """Received bytes: rows of `columns` numbers, then `slots` expert ids and weights."""

    exchange: AllToAllExchange
    pending: PendingRows
    columns: int
    dtype: torch.dtype
    slots: int
    weights_dtype: torch.dtype

    def wait(self) -> Payload:
        bytes_AX = self.pending.wait()
        fp8 = self.exchange.fp8
        width = packed_width(self.columns) if fp8 else self.columns * self.dtype.itemsize
        row_bytes = bytes_AX[:, :width]
        rows_AD = unpack_rows(row_bytes, self.columns, self.dtype) if fp8 else _as_numbers(row_bytes, self.dtype)
        if not self.slots:
            return Payload(rows_AD, None)
        ids_bytes, weights_bytes = bytes_AX[:, width:].tensor_split([self.slots * torch.int32.itemsize], dim=1)
        self.exchange.received(_as_numbers(ids_bytes, torch.int32))
        return Payload(rows_AD, _as_numbers(weights_bytes, self.weights_dtype))


@dataclass(frozen=True)
class _PendingCombine:
    """Returned rows, to be summed by token. If `weights_dtype` is given, they are bytes, followed by those of weights.
    like: has the rows' width and dtype."""

    plan: SendPlan
    pending: PendingRows
    like: Tensor
    weights_dtype: torch.dtype | None

    def wait(self) -> Payload:
        returned_CX = self.pending.wait()
        if self.weights_dtype is None:
            return Payload(self.plan.reduce(returned_CX), None)
        width = self.like.shape[1] * self.like.element_size()
        rows_bytes, weights_bytes = returned_CX.tensor_split([width], dim=1)
        rows_CD, weights_CK = _as_numbers(rows_bytes, self.like.dtype), _as_numbers(weights_bytes, self.weights_dtype)
        return Payload(self.plan.reduce(rows_CD), self.plan.reduce(weights_CK))


def _as_bytes(rows_XD: Tensor) -> Tensor:
    if not len(rows_XD):  # an empty tensor may have any last stride
        return rows_XD.new_empty((0, rows_XD.shape[1] * rows_XD.element_size()), dtype=torch.uint8)
    return rows_XD.contiguous().view(torch.uint8)


def _as_numbers(bytes_XN: Tensor, dtype: torch.dtype) -> Tensor:
    return bytes_XN.clone(memory_format=torch.contiguous_format).view(dtype)
