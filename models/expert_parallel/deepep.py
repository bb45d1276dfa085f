"""Rows to experts and sums home by DeepEP's kernels: over NVLink within a node, over RDMA between nodes.

For DeepEP 2.1 (`ElasticBuffer`, github.com/deepseek-ai/DeepEP), where it is installed: NVIDIA GPUs from Hopper on, NCCL
from 2.30.4 on. Its dispatch is a crossing's `there`, with the router's weights, and its combine is `back`; with the
handle of the first, gradients go the same two ways (its README, "training"). Rows are BF16, or FP8 with FP32 scales
that are powers of two; sums are BF16.

Notable: no machine has run this yet. What is tested is that it uses DeepEP as DeepEP's documentation says, against a
stand-in that does what that says over gloo. DeepEP's transfers are no collectives of torch.distributed: whoever watches
these does not see them, and it is DeepEP's own time limits that end a rank whose peer is gone.

Shapes: T tokens here, A rows that arrive, K slots, L experts here, D hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.deferred import DeferredGradients
from moray.kernels.quantize import dequantize, quantize
from moray.models.config import ModelConfig
from moray.models.expert_parallel.all_to_all import Link, Timed, untimed
from moray.models.expert_parallel.dispatcher import ProcessGroupDispatcher
from moray.models.expert_parallel.exchange import Arrivals, Crossing, Load
from moray.models.expert_parallel.expert_permutation import Spread
from moray.models.expert_parallel.stages import Routing


class _Transfer:
    """One that is under way, for `Link.wait`."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def is_completed(self) -> bool:
        return False  # nobody on the host can tell

    def wait(self) -> None:
        self._event.current_stream_wait()


class DeepEPCrossing:
    """By an `ElasticBuffer`, which all layers share."""

    def __init__(self, buffer: Any, link: Link, routing: Routing, num_experts: int, fp8: bool) -> None:
        self._buffer, self._link, self._num_experts, self._fp8 = buffer, link, num_experts, fp8
        self._ids_TK = routing.ids_TK
        self._handle: Any = None
        self._ids_AK: Tensor | None = None

    def there(self, load: Load) -> Arrivals:
        rows_TD, weights_TK = load
        x = quantize(rows_TD, power_of_two=True) if self._fp8 else rows_TD.contiguous()
        if weights_TK is not None:
            to_experts = {"topk_idx": self._ids_TK.contiguous(), "topk_weights": weights_TK.contiguous()}
            arrived = self._buffer.dispatch(
                x, **to_experts, num_experts=self._num_experts, async_with_compute_stream=True
            )
        else:
            handle = self._handle
            arrived = self._buffer.dispatch(x, handle=handle, num_sms=handle.num_sms, async_with_compute_stream=True)
        x, ids_AK, weights_AK, handle, event = arrived
        if weights_TK is not None:
            self._handle, self._ids_AK = handle, ids_AK

        def waited() -> Load:
            self._link.wait(_Transfer(event), rows_TD.device)
            return Load(dequantize(x[0], x[1], dtype=rows_TD.dtype) if self._fp8 else x, weights_AK)

        return waited

    def back(self, load: Load) -> Arrivals:
        rows_AD, weights_AK = load
        weights_AK = None if weights_AK is None else weights_AK.contiguous()
        rows_TD, weights_TK, event = self._buffer.combine(
            rows_AD.contiguous(), self._handle, topk_weights=weights_AK, async_with_compute_stream=True
        )

        def waited() -> Load:
            self._link.wait(_Transfer(event), rows_AD.device)
            return Load(rows_TD, weights_TK)

        return waited

    def counts_L(self) -> Tensor:  # noqa: N802
        return torch.tensor(self._handle.num_recv_tokens_per_expert_list)

    def spread(self) -> Spread:
        assert self._ids_AK is not None, "rows arrive first"
        counts = self._handle.num_recv_tokens_per_expert_list
        return Spread.of(self._ids_AK, len(counts), sum(counts))


class DeepEPDispatcher(ProcessGroupDispatcher):
    """`buffer`: an `ElasticBuffer` of the group."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        buffer: Any,
        timed: Timed = untimed,
        later: DeferredGradients | None = None,
    ) -> None:
        super().__init__(group, num_experts, timed, later)
        self._buffer = buffer

    def crossing(self, routing: Routing, fp8: bool) -> Crossing:
        return DeepEPCrossing(self._buffer, self.link, routing, self.num_experts, fp8)


def elastic_buffer(group: dist.ProcessGroup, config: ModelConfig, tokens: int, fp8: bool) -> Any:
    """DeepEP's buffer for layers of a model, with at most so many tokens of a rank at a time; the group's ranks all
    call this. What arrives lies in one order in every run. Raises ImportError where DeepEP is not installed."""
    from deep_ep import ElasticBuffer

    return ElasticBuffer(
        group,
        num_max_tokens_per_rank=tokens,
        hidden=config.hidden_size,
        num_topk=config.num_experts_per_tok,
        use_fp8_dispatch=fp8,
        deterministic=True,
    )
