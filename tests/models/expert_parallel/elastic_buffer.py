"""A stand-in for `deep_ep.ElasticBuffer` that implements DeepEP's documentation over gloo.

It tests the calls of `models/expert_parallel/deepep.py` without a GPU. It is stricter than required: tensors in flight
hold garbage until their event has been waited for. It accepts any floating dtype; DeepEP accepts only BF16 rows and
FP32 weights.
"""

import torch
import torch.distributed as dist


class Event:
    def __init__(self, fill):
        self._fill = fill

    def current_stream_wait(self):
        fill, self._fill = self._fill, None
        fill()


class Handle:
    def __init__(self, topk_idx, ranks, num_experts, group):
        self.topk_idx, self.num_experts, self.num_sms, self.group = topk_idx.clone(), num_experts, 4, group
        owners = topk_idx // (num_experts // ranks)
        self.sources = [(owners == rank).any(1).nonzero().squeeze(1) for rank in range(ranks)]
        self.sent = [len(source) for source in self.sources]
        received = torch.empty(ranks, dtype=torch.int64)
        dist.all_to_all_single(received, torch.tensor(self.sent), group=group)
        self.received = received.tolist()

    def dispatch(self, rows):
        out = rows.new_empty((sum(self.received), *rows.shape[1:]))
        sent = torch.cat([rows[source] for source in self.sources])
        dist.all_to_all_single(out, sent, self.received, self.sent, group=self.group)
        return out

    def combine(self, rows):
        out = rows.new_empty((sum(self.sent), *rows.shape[1:]))
        dist.all_to_all_single(out, rows, self.sent, self.received, group=self.group)
        accum_dtype = torch.promote_types(rows.dtype, torch.float32)
        sums = torch.zeros((len(self.topk_idx), *rows.shape[1:]), dtype=accum_dtype)
        return sums.index_add_(0, torch.cat(self.sources), out.to(accum_dtype)).to(rows.dtype)


class ElasticBuffer:
    def __init__(
        self, group, *, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch=False, deterministic=False
    ):
        self.group, self.most, self.hidden, self.slots = group, num_max_tokens_per_rank, hidden, num_topk
        self.fp8 = use_fp8_dispatch
        assert deterministic, "the order of received rows would vary"

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        num_experts=None,
        num_sms=0,
        handle=None,
        async_with_compute_stream=False,
    ):
        assert async_with_compute_stream
        assert isinstance(x, tuple) == self.fp8
        parts = x if self.fp8 else (x,)
        assert parts[0].shape[1] == self.hidden
        assert parts[0].shape[1] * parts[0].element_size() % 16 == 0
        assert all(part.is_contiguous() for part in (*parts, topk_idx, topk_weights) if part is not None)
        first = handle is None
        assert len(parts[0]) <= self.most
        if first:
            assert topk_idx.dtype == torch.int64
            assert topk_idx.shape == topk_weights.shape == (len(parts[0]), self.slots)
            handle = Handle(topk_idx, dist.get_world_size(self.group), num_experts, self.group)
        else:
            assert topk_idx is None
            assert num_experts is None
            assert num_sms == handle.num_sms, "it would be estimated from the number of experts, which is not given"
        received = tuple(handle.dispatch(part.view(torch.uint8)).view(part.dtype) for part in parts)
        ids, weights = None, None
        if first:
            local = num_experts // dist.get_world_size(self.group)
            ids = handle.dispatch(topk_idx) - dist.get_rank(self.group) * local
            ids = torch.where((ids >= 0) & (ids < local), ids, -1)
            weights = handle.dispatch(topk_weights)
            handle.num_recv_tokens_per_expert_list = [int((ids == expert).sum()) for expert in range(local)]
        *shown, event = _in_flight(*received, ids, weights)
        return tuple(shown[: len(parts)]) if self.fp8 else shown[0], shown[-2], shown[-1], handle, event

    def combine(self, x, handle, topk_weights=None, async_with_compute_stream=False):
        assert async_with_compute_stream
        assert x.is_contiguous()
        assert x.shape == (sum(handle.received), self.hidden)
        weights = None
        if topk_weights is not None:
            assert topk_weights.is_contiguous()
            weights = handle.combine(topk_weights)
        return _in_flight(handle.combine(x), weights)


def _in_flight(*tensors):
    """Tensors that hold garbage until the event, which is returned last, has been waited for."""
    shown = [None if tensor is None else torch.full_like(tensor.float(), -7.0).to(tensor.dtype) for tensor in tensors]

    def fill():
        for target, tensor in zip(shown, tensors, strict=True):
            if tensor is not None:
                target.copy_(tensor)

    return *shown, Event(fill)
