"""Two hops: a token goes once to each node that holds any of its experts, and from there to the ranks.

It goes to the rank with the sender's own number in its node. That rank forwards it within the node, and on the way back
sums what its node returns (DeepSeek-V3 §3.2.2). So less goes through the network, and more through NVLink or memory.

One exchange of counts, ahead of the rows, tells a rank the counts of both hops. On a GPU both hops are issued at once,
to a stream of their own. On the CPU a thread runs them. There, transfers run one at a time, in the same order on all
ranks.

Shapes: T tokens of this rank, A received rows, F rows that a rank forwards, K slots, P ranks, N nodes, G ranks of a
node, L local experts, C returned rows, X bytes.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.util.device import WorkQueue
from moray.models.expert_parallel.all_to_all import AllToAll, PendingRows
from moray.models.expert_parallel.count_exchange import CountExchange
from moray.models.expert_parallel.exchange_check import ExchangeCheck
from moray.models.expert_parallel.routes import (
    HopCounts,
    LayerRouting,
    Payload,
    PendingPayload,
    PendingSums,
    SumForm,
    as_numbers,
    row_bytes,
)
from moray.models.expert_parallel.send_plan import SendPlan


@dataclass(frozen=True)
class Nodes:
    """The hops of a two-hop route, of groups that are made once. between: ranks with this one's number, of all nodes.
    within: the ranks of this node. Both wait only on the queue. The ranks of a node are consecutive."""

    between: AllToAll
    within: AllToAll
    queue: WorkQueue

    @property
    def width(self) -> int:
        """Ranks of a node."""
        return dist.get_world_size(self.within.group)


class TwoHopRoute:
    """A row for each node, forwarded within it. all_to_all: of all ranks, for the counts, and for waiting."""

    def __init__(self, all_to_all: AllToAll, nodes: Nodes, routing: LayerRouting, check: ExchangeCheck) -> None:
        self._all_to_all, self._nodes, self._routing, self._check = all_to_all, nodes, routing, check
        ranks = routing.plan()
        self._between = ranks.grouped(nodes.width)
        # For each rank: what goes to its node, and from there to each of the node's ranks, in rows.
        within_NG = ranks.send_counts().view(-1, nodes.width)
        node_N2 = torch.stack((self._between.send_counts(), self._between.totals(routing.ids_TK.sum(1))), dim=1)
        of_node = torch.cat((node_N2, within_NG), dim=1).repeat_interleave(nodes.width, 0)
        self._pending_counts = CountExchange(
            all_to_all, torch.cat((routing.columns(ranks), of_node), dim=1), routing.layer
        )
        self._counts: tuple[HopCounts, HopCounts] | None = None
        self._within: SendPlan | None = None  # once the first rows to forward have come

    def start_dispatch(self, rows_TD: Tensor, metadata_TX: Tensor, fp8: bool) -> PendingRows:
        if self._counts is None:
            self._receive_counts()
        rows_TX = row_bytes(rows_TD, metadata_TX, fp8)
        ids_at = rows_TX.shape[1] - metadata_TX.shape[1]
        return self._all_to_all.later(self._nodes.queue, lambda: self._dispatch(rows_TX, ids_at), rows_TX.device)

    def _dispatch(self, rows_TX: Tensor, ids_at: int) -> Tensor:
        """Both hops. rows_TX: bytes; those from `ids_at` on begin with the expert ids, the first time."""
        assert self._counts is not None
        between, within = self._counts
        sent_CX = self._between.gather(rows_TX, sum(between.send))
        rows_FX = self._nodes.between.start(sent_CX, *between).wait()
        if self._within is None:
            slots = self._routing.ids_TK.shape[1]
            ids_FK = as_numbers(rows_FX[:, ids_at : ids_at + 4 * slots], torch.int32)
            senders = tuple(dist.get_process_group_ranks(self._nodes.between.group))
            self._check.compare(self._routing.layer, senders, self._sums_N, self._rows_N, ids_FK)
            local = len(self._routing.experts)
            first = dist.get_rank(self._nodes.between.group) * self._nodes.width * local
            self._within = SendPlan.of(ids_FK, self._nodes.width, local, first)
        return self._nodes.within.start(self._within.gather(rows_FX, sum(within.send)), *within).wait()

    def start_combine(self, payload: Payload) -> PendingPayload:
        form = SumForm.of(payload)
        rows_AX = form.joined(payload)
        pending = self._all_to_all.later(self._nodes.queue, lambda: self._combine(rows_AX, form), rows_AX.device)
        return PendingSums(pending, form, self._between)

    def _combine(self, rows_AX: Tensor, form: SumForm) -> Tensor:
        """Both hops, with the sum of each node's results between them."""
        assert self._counts is not None
        assert self._within is not None, "a dispatch comes first"
        (to_nodes, from_nodes), (forwarded, received) = self._counts
        returned_CX = self._nodes.within.start(rows_AX, received, forwarded).wait()
        sums = form.joined(form.sums(returned_CX, self._within))
        return self._nodes.between.start(sums, from_nodes, to_nodes).wait()

    def _receive_counts(self) -> None:
        counts = self._pending_counts.wait()
        local, width = len(self._routing.experts), self._nodes.width
        me = dist.get_rank(self._nodes.within.group)
        sent_NGX, received_NGX = (both.view(-1, width, both.shape[1]) for both in (counts.sent_PX, counts.received_PX))
        rows, forwarded = local + 1, local + 3  # columns
        between = HopCounts(sent_NGX[:, 0, rows].tolist(), received_NGX[:, me, rows].tolist())
        within = HopCounts(
            received_NGX[:, me, forwarded:].sum(0).tolist(), received_NGX[:, :, forwarded + me].sum(0).tolist()
        )
        self._counts = between, within
        self._counts_L = counts.received_PX[:, :local].sum(0)
        came_NGX = counts.received_on_device_PX.view_as(received_NGX)
        self._rows_N, self._sums_N = came_NGX[:, me, rows], came_NGX[:, me, rows + 1]
        self._rows_G, self._sums_G = came_NGX[:, :, forwarded + me].sum(0), came_NGX[:, :, local].sum(0)

    def counts_L(self) -> Tensor:  # noqa: N802
        assert self._counts is not None, "a dispatch comes first"
        return self._counts_L

    def check(self, ids_AK: Tensor) -> None:
        senders = tuple(dist.get_process_group_ranks(self._nodes.within.group))
        self._check.compare(self._routing.layer, senders, self._sums_G, self._rows_G, ids_AK)
