"""The ranks of test_two_hop.py: consecutive ranks play the nodes."""

import dataclasses
from functools import partial

import torch
import torch.distributed as dist

from moray.kernels.util.deferred import DeferredGradients
from moray.kernels.util.device import runtime
from moray.models.expert_parallel.all_to_all import AllToAll
from moray.models.expert_parallel.dispatcher import ProcessGroupDispatcher
from moray.models.expert_parallel.interleave import interleave, run_alone
from moray.models.expert_parallel.shared_memory import connect
from moray.models.expert_parallel.two_hop import Nodes
from moray.models.model import DeepseekV3
from tests.models.expert_parallel import layer_ranks

CONFIG = dataclasses.replace(
    layer_ranks.CONFIG, n_routed_experts=32, num_experts_per_tok=6, n_group=4, topk_group=2, hidden_size=16
)
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def make_nodes(width, shared=False):
    """The nodes of all ranks, `width` ranks each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [dist.new_group(range(first, first + width)) for first in range(0, world, width)]
    columns = [dist.new_group(range(first, world, width)) for first in range(width)]
    within = rows[rank // width]
    memory = connect(within) if shared else None
    device = torch.device("cpu")
    return Nodes(AllToAll(columns[rank % width]), AllToAll(within, memory=memory), runtime(device).queue())


def check_layers(width):
    """The cases of one hop, also with shared memory within the nodes."""
    for shared in (False, True):
        nodes = make_nodes(width, shared)

        def dispatching(hidden, slots, fp8, nodes=nodes):
            return ProcessGroupDispatcher(dist.group.WORLD, layer_ranks.CONFIG.n_routed_experts, nodes=nodes)

        layer_ranks.check_model(dist.group.WORLD, dispatching, False)
        layer_ranks.check_model(dist.group.WORLD, dispatching, True)
        layer_ranks.check_padding(dist.group.WORLD, dispatching)
        layer_ranks.check_empty_rank(dist.group.WORLD, dispatching)
        layer_ranks.check_fp8(dist.group.WORLD, dispatching)


def check_equal_to_one_hop(width):
    """Losses and gradients of a model, with pairs of micro-batches of different sizes and deferred gradients."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [torch.randint(0, 40, (size, 8), generator=generator) for size in (1 + dist.get_rank() % 2, 2)]
    expected = _step(None, batches, DeferredGradients(), interleave)
    nodes = make_nodes(width, shared=True)
    for deferred, run in ((None, partial(map, run_alone)), (DeferredGradients(), interleave)):
        for name, value in _step(nodes, batches, deferred, run).items():
            torch.testing.assert_close(value, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def _step(nodes, batches, deferred, run):
    dispatcher = ProcessGroupDispatcher(dist.group.WORLD, CONFIG.n_routed_experts, deferred=deferred, nodes=nodes)
    model = DeepseekV3(CONFIG, experts=dispatcher.experts, dispatcher=dispatcher).double()
    model.init_weights(5)
    model.train()
    model.defer_gradients(deferred)
    losses = list(run([model.training_parts(ids, ids.flip(1)) for ids in batches]))
    loss = sum(loss.main + 0.3 * loss.mtp + loss.balance for loss in losses)
    loss.backward()
    if deferred is not None:
        deferred.finish()
    assert int(dispatcher.check.total()) == 0
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
