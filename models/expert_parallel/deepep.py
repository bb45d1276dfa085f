"""Dispatch and combine by DeepEP's kernels: over NVLink within a node, over RDMA between nodes.

This requires DeepEP 2.1 (`ElasticBuffer`, github.com/deepseek-ai/DeepEP), NVIDIA GPUs from Hopper on, and NCCL from
2.30.4 on. The forward pass dispatches with the router's weights; the backward pass uses the handle of that dispatch
(DeepEP's README, "training"). Rows are BF16, or FP8 with FP32 scales that are powers of two; sums are BF16.

Notable: no machine has run this yet. The tests check that the calls follow DeepEP's documentation, against a stand-in
that implements the documented behavior over gloo. DeepEP's transfers are not torch.distributed collectives, so
monitoring of collectives does not see them. If a peer is gone, only DeepEP's own timeouts end a rank.

Shapes: T tokens of this rank, A received rows, K slots, L local experts, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.fp8_rows import Fp8Rows
from moray.kernels.quantize import quantize
from moray.kernels.util.deferred import DeferredGradients
from moray.models.config import ModelConfig
from moray.models.expert_parallel.all_to_all import AllToAll, Timed, untimed
from moray.models.expert_parallel.dispatcher import ProcessGroupDispatcher
from moray.models.expert_parallel.exchange import Exchange
from moray.models.expert_parallel.expert_permutation import ExpertPermutation, expert_permutation
from moray.models.expert_parallel.routes import Payload, PendingPayload
from moray.models.expert_parallel.stages import Routing


class _Event:
    """A transfer in flight, for `AllToAll.wait`."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def is_completed(self) -> bool:
        return False  # the host has no way to query it

    def wait(self) -> None:
        self._event.current_stream_wait()


@dataclass(frozen=True)
class _Pending:
    """A payload that DeepEP's kernels are writing. scales: of FP8 rows, or None."""

    all_to_all: AllToAll
    event: Any
    rows: Tensor
    scales: Tensor | None
    weights: Tensor | None
    dtype: torch.dtype

    def wait(self) -> Payload:
        self.all_to_all.wait(_Event(self.event), self.rows.device)
        if self.scales is None:
            return Payload(self.rows, self.weights)
        return Payload(Fp8Rows(self.rows, self.scales, self.dtype), self.weights)


class DeepEPExchange:
    """An exchange by an `ElasticBuffer`, which all layers share."""

    def __init__(self, buffer: Any, all_to_all: AllToAll, routing: Routing, num_experts: int, fp8: bool) -> None:
        self._buffer, self._all_to_all, self._num_experts, self._fp8 = buffer, all_to_all, num_experts, fp8
        self._ids_TK = routing.ids_TK
        self._handle: Any = None
        self._ids_AK: Tensor | None = None

    def start_dispatch(self, payload: Payload) -> PendingPayload:
        rows_TD, weights_TK = payload
        x = quantize(rows_TD, power_of_two=True) if self._fp8 else rows_TD.contiguous()
        if weights_TK is not None:
            routed = {"topk_idx": self._ids_TK.contiguous(), "topk_weights": weights_TK.contiguous()}
            received = self._buffer.dispatch(x, **routed, num_experts=self._num_experts, async_with_compute_stream=True)
        else:
            handle = self._handle
            received = self._buffer.dispatch(x, handle=handle, num_sms=handle.num_sms, async_with_compute_stream=True)
        x, ids_AK, weights_AK, handle, event = received
        if weights_TK is not None:
            self._handle, self._ids_AK = handle, ids_AK
        rows, scales = x if self._fp8 else (x, None)
        return _Pending(self._all_to_all, event, rows, scales, weights_AK, rows_TD.dtype)

    def start_combine(self, payload: Payload) -> PendingPayload:
        rows_AD, weights_AK = payload
        weights_AK = None if weights_AK is None else weights_AK.contiguous()
        rows_TD, weights_TK, event = self._buffer.combine(
            rows_AD.contiguous(), self._handle, topk_weights=weights_AK, async_with_compute_stream=True
        )
        return _Pending(self._all_to_all, event, rows_TD, None, weights_TK, rows_AD.dtype)

    def counts_L(self) -> Tensor:  # noqa: N802
        return torch.tensor(self._handle.num_recv_tokens_per_expert_list)

    def permutation(self) -> ExpertPermutation:
        assert self._ids_AK is not None, "a dispatch with weights comes first"
        counts = self._handle.num_recv_tokens_per_expert_list
        return expert_permutation(self._ids_AK, len(counts), sum(counts), self._fp8)


class DeepEPDispatcher(ProcessGroupDispatcher):
    """A dispatcher by `buffer`, an `ElasticBuffer` of the group."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        buffer: Any,
        timed: Timed = untimed,
        deferred: DeferredGradients | None = None,
    ) -> None:
        super().__init__(group, num_experts, timed, deferred)
        self._buffer = buffer

    def exchange(self, routing: Routing, fp8: bool, layer: int) -> Exchange:
        return DeepEPExchange(self._buffer, self.all_to_all, routing, self.num_experts, fp8)


def elastic_buffer(group: dist.ProcessGroup, config: ModelConfig, tokens: int, fp8: bool) -> Any:
    """DeepEP's buffer for a model's layers, with at most `tokens` tokens per rank at a time. All ranks of the group
    must call this. Received rows have the same order in every run. Raises ImportError if DeepEP is not installed."""
    from deep_ep import ElasticBuffer

    return ElasticBuffer(
        group,
        num_max_tokens_per_rank=tokens,
        hidden=config.hidden_size,
        num_topk=config.num_experts_per_tok,
        use_fp8_dispatch=fp8,
        deterministic=True,
    )
