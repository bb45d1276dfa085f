"""Routes: how one layer's rows get from the ranks of the tokens to the ranks of the experts, and back as sums.

`DirectRoute` sends a token once to each rank that holds any of its experts. `two_hop.TwoHopRoute` sends it once to
each node.

Shapes: T tokens of this rank, A received rows, K slots, P ranks, E experts, L local experts, C returned rows, D hidden
size, X bytes.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.wire import pack_rows
from moray.models.expert_parallel.all_to_all import AllToAll, PendingRows
from moray.models.expert_parallel.count_exchange import CountExchange
from moray.models.expert_parallel.exchange_check import ExchangeCheck
from moray.models.expert_parallel.send_plan import SendPlan


class Payload(NamedTuple):
    """The tensors of an exchange: rows, [T, D] or [A, D], and a number for each of their slots, [T, K] or [A, K], or
    None."""

    rows: Tensor
    weights: Tensor | None


class PendingPayload(Protocol):
    """A payload in flight."""

    def wait(self) -> Payload:
        """Blocks until the payload is received; called once."""


class Route(Protocol):
    """The route of one layer's rows. Dispatch comes first; in the backward pass it is used again."""

    def start_dispatch(self, rows_TD: Tensor, metadata_TX: Tensor, fp8: bool) -> PendingRows:
        """Starts sending rows, packed in FP8 or as they are, followed by bytes. The receiver gets both as bytes, uint8
        [A, X]."""

    def start_combine(self, payload: Payload) -> PendingPayload:
        """Starts returning a row for each received one, in their order. The sender of the token gets their sums."""

    def counts_L(self) -> Tensor:  # noqa: N802
        """Rows of each local expert, int64, on the host, once a dispatch has started."""

    def check(self, ids_AK: Tensor) -> None:
        """Compares received expert ids with those that were sent."""


@dataclass(frozen=True)
class LayerRouting:
    """What a route is made for. experts: the local range, as many on every rank."""

    layer: int
    ids_TK: Tensor
    counts_E: Tensor
    experts: range

    def plan(self) -> SendPlan:
        """What this rank sends to each rank."""
        return SendPlan.of(self.ids_TK, len(self.counts_E) // len(self.experts), len(self.experts))

    def columns(self, plan: SendPlan) -> Tensor:
        """For each rank: pairs of each of its experts, and the sum of expert ids of the rows for it: [P, L + 1]."""
        pairs_PL = self.counts_E.view(-1, len(self.experts))
        return torch.cat((pairs_PL, plan.totals(self.ids_TK.sum(1)).unsqueeze(1)), dim=1)


class HopCounts(NamedTuple):
    """Rows sent to each rank of a hop's group and received from each."""

    send: list[int]
    receive: list[int]


class DirectRoute:
    """A row for each rank."""

    def __init__(self, all_to_all: AllToAll, routing: LayerRouting, check: ExchangeCheck) -> None:
        self._all_to_all, self._routing, self._check = all_to_all, routing, check
        self._plan = routing.plan()
        columns_PX = torch.cat((routing.columns(self._plan), self._plan.send_counts().unsqueeze(1)), dim=1)
        self._pending_counts = CountExchange(all_to_all, columns_PX, routing.layer)
        self._counts: HopCounts | None = None

    def start_dispatch(self, rows_TD: Tensor, metadata_TX: Tensor, fp8: bool) -> PendingRows:
        if self._counts is None:
            counts = self._pending_counts.wait()
            self._counts = HopCounts(counts.sent_PX[:, -1].tolist(), counts.received_PX[:, -1].tolist())
            self._counts_L = counts.received_PX[:, : len(self._routing.experts)].sum(0)
            self._sums_P, self._rows_P = counts.received_on_device_PX[:, -2:].unbind(1)
        send, receive = self._counts
        if fp8 and self._all_to_all.memory is not None:
            return self._all_to_all.start_fp8(rows_TD, metadata_TX, self._plan.sent_PT, send, receive)
        rows_CX = self._plan.gather(row_bytes(rows_TD, metadata_TX, fp8), sum(send))
        return self._all_to_all.start(rows_CX, send, receive)

    def start_combine(self, payload: Payload) -> PendingPayload:
        assert self._counts is not None
        form = SumForm.of(payload)
        pending = self._all_to_all.start(form.joined(payload), self._counts.receive, self._counts.send)
        return PendingSums(pending, form, self._plan)

    def counts_L(self) -> Tensor:  # noqa: N802
        assert self._counts is not None, "a dispatch comes first"
        return self._counts_L

    def check(self, ids_AK: Tensor) -> None:
        senders = tuple(dist.get_process_group_ranks(self._all_to_all.group))
        self._check.compare(self._routing.layer, senders, self._sums_P, self._rows_P, ids_AK)


class SumForm(NamedTuple):
    """How a payload is sent to be summed: rows as they are, or with weights, as bytes of both."""

    like: Tensor  # no rows, of the rows' width and dtype
    weights_dtype: torch.dtype | None

    @classmethod
    def of(cls, payload: Payload) -> "SumForm":
        rows, weights = payload
        like = rows.new_empty(0, rows.shape[1])  # not the rows themselves, which are freed once sent
        return cls(like, None if weights is None else weights.dtype)

    def joined(self, payload: Payload) -> Tensor:
        if payload.weights is None:
            return payload.rows
        return torch.cat((as_bytes(payload.rows), as_bytes(payload.weights)), dim=1)

    def sums(self, returned_CX: Tensor, plan: SendPlan) -> Payload:
        """The sums of the returned rows, and weights, of each row that the plan sent."""
        if self.weights_dtype is None:
            return Payload(plan.reduce(returned_CX), None)
        width = self.like.shape[1] * self.like.element_size()
        rows_CX, weights_CX = returned_CX.tensor_split([width], dim=1)
        rows_CD, weights_CK = as_numbers(rows_CX, self.like.dtype), as_numbers(weights_CX, self.weights_dtype)
        return Payload(plan.reduce(rows_CD), plan.reduce(weights_CK))


@dataclass(frozen=True)
class PendingSums:
    """Returned rows, to be summed by token."""

    pending: PendingRows
    form: SumForm
    plan: SendPlan

    def wait(self) -> Payload:
        return self.form.sums(self.pending.wait(), self.plan)


def row_bytes(rows_TD: Tensor, metadata_TX: Tensor, fp8: bool) -> Tensor:
    """The bytes of rows, in FP8 (`kernels/wire.py`) or as they are, followed by metadata."""
    return torch.cat((pack_rows(rows_TD) if fp8 else as_bytes(rows_TD), metadata_TX), dim=1)


def as_bytes(rows_XD: Tensor) -> Tensor:
    """uint8 [X, D * bytes of a number]."""
    if not len(rows_XD):  # an empty tensor may have any last stride
        return rows_XD.new_empty((0, rows_XD.shape[1] * rows_XD.element_size()), dtype=torch.uint8)
    return rows_XD.contiguous().view(torch.uint8)


def as_numbers(bytes_XN: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_bytes`."""
    return bytes_XN.clone(memory_format=torch.contiguous_format).view(dtype)
