"""The ranks of test_dispatcher.py: all cases at EP=2 and EP=4 against a model that holds every expert."""

import dataclasses
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist

from moray.models.expert_parallel import deepep
from moray.models.expert_parallel.dispatcher import LocalDispatcher, ProcessGroupDispatcher
from moray.models.expert_parallel.shared_memory import connect
from moray.models.expert_parallel.stages import Routing
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from tests.models.expert_parallel import elastic_buffer

CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=3,
    initializer_range=0.2,
    max_position_embeddings=16,
    num_nextn_predict_layers=1,
)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def routing_to(ids_TK, weights_TK, experts):
    return Routing(ids_TK, weights_TK, torch.bincount(ids_TK.flatten(), minlength=experts), None)


def _model(one_expert, **placement):
    config = dataclasses.replace(CONFIG, num_experts_per_tok=1) if one_expert else CONFIG
    model = DeepseekV3(config, **placement).double()
    model.init_weights(5)
    if one_expert:
        for _, bias_E in model.logical_biases():
            bias_E[5] = 100.0
    return model


def _grads(model):
    return {
        name: owner.grad.as_strided(view.shape, view.stride(), view.storage_offset())
        for name, view, owner in model.logical_parameters()
    }


def _loss(model, ids):
    terms = model.training_loss(ids, ids.flip(1))
    return terms.main + 0.3 * terms.mtp + 0.1 * terms.balance


def check_model(group, dispatching, one_expert):
    """Each rank has its own batch, of its own size; losses are sums, so gradients add up."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = dispatching(CONFIG.hidden_size, 1 if one_expert else CONFIG.num_experts_per_tok, False)
    ours = _model(one_expert, experts=dispatcher.experts, dispatcher=dispatcher)
    whole = _model(one_expert)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 40, (r + 1, 8), generator=generator) for r in range(ranks)]
    ids = torch.cat(batches)
    _loss(whole, ids).backward()
    mine = batches[rank]
    loss = _loss(ours, mine)
    loss.backward()
    torch.testing.assert_close(loss, _loss(whole, mine), **EXACT)
    torch.testing.assert_close(ours(mine).logits, whole(mine).logits, **EXACT)
    expected = _grads(whole)
    for name, grad in _grads(ours).items():
        if ".experts." not in name:
            dist.all_reduce(grad, group=group)
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    if one_expert:
        rows = sum(int(shard.load_E.sum()) for shard in ours.shards())
        assert (rows > 0) == (5 in dispatcher.experts)


def check_padding(group, dispatching):
    """Padding is sent to no expert and changes no loss, gradient or count. The last rank has only padding."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = dispatching(CONFIG.hidden_size, CONFIG.num_experts_per_tok, False)
    ours, whole = _model(False, experts=dispatcher.experts, dispatcher=dispatcher), _model(False)
    tokens = [torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(r)) for r in range(ranks - 1)]
    terms = whole.training_loss(torch.cat(tokens), torch.cat(tokens).flip(1))
    (terms.main + 0.3 * terms.mtp + 0.1 * terms.balance).backward()
    ids, targets, real = torch.full((2, 12), 2), torch.full((2, 12), -100), torch.zeros(2, 12, dtype=torch.bool)
    if rank < ranks - 1:
        ids[:, :8], targets[:, :8], real[:, :8] = tokens[rank], tokens[rank].flip(1), True
    mine = ours.training_loss(ids, targets, token_positions_R=real.flatten().nonzero().squeeze(1))
    (mine.main + 0.3 * mine.mtp + 0.1 * mine.balance).backward()
    for name in ("main", "mtp", "balance"):
        total = getattr(mine, name).detach().clone()
        dist.all_reduce(total, group=group)
        torch.testing.assert_close(total, getattr(terms, name).detach(), **EXACT)
    counts = ours.router_counts()
    dist.all_reduce(counts, group=group)
    assert torch.equal(counts, whole.router_counts())
    expected = _grads(whole)
    for name, grad in _grads(ours).items():
        if ".experts." not in name:
            dist.all_reduce(grad, group=group)
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def check_empty_rank(group, dispatching):
    """The last rank has no tokens."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = dispatching(3, 2, False)
    tokens = 0 if rank == ranks - 1 else 5
    rows_TD = (torch.arange(tokens)[:, None] + 100.0 * rank).repeat(1, 3).requires_grad_()
    ids_TK = (torch.arange(tokens)[:, None] + torch.arange(2)) % 8
    weights_TK = torch.rand(tokens, 2, requires_grad=True)
    dispatch = dispatcher.dispatch(rows_TD, routing_to(ids_TK, weights_TK, 8))
    dispatch.start_dispatch()
    rows_RD, weights_R, counts_L, _ = dispatch.wait_dispatch()
    assert counts_L.sum() == len(rows_RD) == len(weights_R)
    expert_R = torch.repeat_interleave(torch.tensor(dispatcher.experts), counts_L)
    dispatch.start_combine(rows_RD * (weights_R * (1 + expert_R))[:, None])
    combined_TD, factors_TK = dispatch.wait_combine(), 1.0 + ids_TK
    sums_T1 = (weights_TK * factors_TK).detach().sum(1, keepdim=True)
    torch.testing.assert_close(combined_TD, rows_TD * sums_T1)
    combined_TD.sum().backward()
    torch.testing.assert_close(rows_TD.grad, sums_T1.expand(-1, 3))
    torch.testing.assert_close(weights_TK.grad, rows_TD.detach().sum(1, keepdim=True) * factors_TK)


def check_fp8(group, dispatching):
    """Rows and gradients sent in FP8 are bit-identical to those that are not sent, if sums of two are exact: the
    numbers have five bits, and only the ranks' sums are rounded to BF16's eight."""
    rank = dist.get_rank(group)
    generator = torch.Generator().manual_seed(rank)
    x_TD, factors_TD = torch.randn(2, 6, 208, generator=generator)
    x_TD = (x_TD * torch.logspace(-4, 4, 208)).bfloat16()
    routing = routing_to(torch.rand(6, 8, generator=generator).topk(2).indices, torch.rand(6, 2), 8)
    found = []
    for dispatcher in (LocalDispatcher(), dispatching(208, 2, True)):
        rows_TD = x_TD.clone().requires_grad_()
        dispatch = dispatcher.dispatch(rows_TD, routing, fp8=True)
        dispatch.start_dispatch()
        dispatch.start_combine(dispatch.wait_dispatch()[0] * 2)
        combined_TD = dispatch.wait_combine()
        (combined_TD * factors_TD).sum().backward()
        found.append((combined_TD.detach(), rows_TD.grad))
    for local, remote in zip(*found, strict=True):
        assert torch.equal(local, remote)


def _by_exchange(group, memory, hidden, slots, fp8):
    return ProcessGroupDispatcher(group, CONFIG.n_routed_experts, memory=memory)


def _by_deepep(group, hidden, slots, fp8):
    config = dataclasses.replace(CONFIG, hidden_size=hidden, num_experts_per_tok=slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", elastic_buffer)
        buffer = deepep.elastic_buffer(group, config, tokens=100, fp8=fp8)
    return deepep.DeepEPDispatcher(group, CONFIG.n_routed_experts, buffer)


def check_all():
    """Every case, at EP=2 and EP=4, through gloo, through shared memory, and through DeepEP's interface."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for group in (dist.group.WORLD, pairs[rank // 2]):
        exchanges = [partial(_by_exchange, group, memory) for memory in (None, connect(group))]
        for dispatching in (*exchanges, partial(_by_deepep, group)):
            for one_expert in (False, True):
                check_model(group, dispatching, one_expert)
            check_padding(group, dispatching)
            check_fp8(group, dispatching)
        for dispatching in exchanges:
            check_empty_rank(group, dispatching)
    with pytest.raises(ValueError, match="6 experts are not divisible by the 4 ranks"):
        ProcessGroupDispatcher(dist.group.WORLD, 6)
    with pytest.raises(ValueError, match="the dispatcher sends range"):
        DeepseekV3(CONFIG, dispatcher=ProcessGroupDispatcher(dist.group.WORLD, 8))
