"""The ranks of test_interleave.py: interleaved batches with deferred gradients, against one batch after the other."""

import dataclasses
from functools import partial

import torch
import torch.distributed as dist

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.dispatcher import ProcessGroupDispatcher
from moray.models.expert_parallel.interleave import interleave, run_alone
from moray.models.expert_parallel.shared_memory import connect
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.resilience.collectives import CollectiveTrace, check_order
from tests.models.expert_parallel.layer_ranks import CONFIG as SMALL

CONFIG = dataclasses.replace(SMALL, hidden_size=128)  # whole tiles, for FP8


def make_batches(generator, *sizes):
    """Two at a time, since a sum of three depends on its order."""
    drawn = [torch.randint(0, 40, (size, 8), generator=generator) for size in sizes]
    return [(ids, ids.flip(1), None) for ids in drawn]


def check_same(name, gradient, expected):
    """To the bit; but embedding and head are used twice in a batch, and sums of four depend on their order."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(gradient, expected, msg=lambda text: f"{name}: {text}")
    else:
        assert torch.equal(gradient, expected), name


def losses_of(model, batches, overlapped):
    run = interleave if overlapped else partial(map, run_alone)
    return list(run([model.training_parts(*batch) for batch in batches]))


def _step(group, memory, fp8, overlapped, batches):
    """Loss, gradients by name, and what this rank communicated."""
    deferred = DeferredGradients() if overlapped else None
    dispatcher = ProcessGroupDispatcher(group, CONFIG.n_routed_experts, deferred=deferred, memory=memory)
    model = DeepseekV3(CONFIG, experts=dispatcher.experts, dispatcher=dispatcher)
    model.init_weights(5)
    model.train()
    if fp8:
        model.compute_in(torch.bfloat16)
        model.train_in_fp8()
    else:
        model.double()
    model.defer_gradients(deferred)
    with CollectiveTrace() as trace:
        losses = losses_of(model, batches, overlapped)
        loss = sum(loss.main + 0.3 * loss.mtp + loss.balance for loss in losses)
        loss.backward()
    if deferred is not None:
        deferred.finish()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, trace.collectives


def check_overlap():
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    generator = torch.Generator().manual_seed(rank)
    for group in (dist.group.WORLD, pairs[rank // 2]):
        memory = connect(group)
        assert memory is not None
        for fp8, shared in ((False, None), (True, None), (True, memory)):
            batches = make_batches(generator, rank + 1, rank + 2)  # different sizes on different ranks
            loss, gradients, trace = _step(group, None, fp8, False, batches)
            again, same, overlapped = _step(group, shared, fp8, True, batches)
            assert torch.equal(loss, again)
            for name, gradient in gradients.items():
                check_same(name, same[name], gradient)
            traces = [None] * dist.get_world_size()
            dist.all_gather_object(traces, overlapped)
            check_order(traces)
            assert len(trace) == len(overlapped)
