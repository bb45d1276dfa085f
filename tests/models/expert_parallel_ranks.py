"""The ranks of test_dispatch.py: all cases at EP=2 and EP=4 against a model that holds every expert."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from moray.models.dispatch import LocalDispatcher, ProcessGroupDispatcher
from moray.models.model import DeepseekV3
from moray.models.peers import connect
from moray.models.presets import preset

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
    return terms.main + 0.3 * terms.prediction + 0.1 * terms.balance


def check_model(group, memory, one_expert):
    """Each rank has its own batch, of its own size; losses are sums, so gradients add up."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = ProcessGroupDispatcher(group, CONFIG.n_routed_experts, memory=memory)
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


def check_empty_rank(group, memory):
    """The last rank has no tokens."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = ProcessGroupDispatcher(group, 8, memory=memory)
    tokens = 0 if rank == ranks - 1 else 5
    rows_TD = (torch.arange(tokens)[:, None] + 100.0 * rank).repeat(1, 3).requires_grad_()
    ids_TK = (torch.arange(tokens)[:, None] + torch.arange(2)) % 8
    dispatch = dispatcher.dispatch(rows_TD, ids_TK)
    dispatch.send()
    rows_RD, counts_E = dispatch.arrived()
    assert counts_E.sum() == len(rows_RD)
    expert_R = torch.repeat_interleave(torch.tensor(dispatcher.experts), counts_E)
    dispatch.send_back(rows_RD * (1 + expert_R[:, None]))
    home_TKD = dispatch.home()
    torch.testing.assert_close(home_TKD, rows_TD[:, None] * (1 + ids_TK[..., None]))
    home_TKD.sum().backward()
    torch.testing.assert_close(rows_TD.grad, (1.0 + ids_TK).sum(1, keepdim=True).expand(-1, 3))


def check_fp8(group, memory):
    """Rows and gradients that cross in FP8 are, to the bit, those that do not cross; results come home as they are."""
    rank = dist.get_rank(group)
    crossing, local = ProcessGroupDispatcher(group, 8, memory=memory), LocalDispatcher(8)
    generator = torch.Generator().manual_seed(rank)
    x_TD, weights_TKD = torch.randn(6, 1, 200, generator=generator), torch.randn(6, 2, 200, generator=generator)
    x_TD = (x_TD[:, 0] * torch.logspace(-4, 4, 200)).bfloat16()
    ids_TK = torch.rand(6, 8, generator=generator).topk(2).indices
    found = []
    for dispatcher in (local, crossing):
        rows_TD = x_TD.clone().requires_grad_()
        dispatch = dispatcher.dispatch(rows_TD, ids_TK, fp8=True)
        dispatch.send()
        dispatch.send_back(dispatch.arrived()[0] * 3)
        home_TKD = dispatch.home()
        (home_TKD * weights_TKD).sum().backward()
        found.append((home_TKD.detach(), rows_TD.grad))
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)


def check_all():
    """Every case, at EP=2 and EP=4, through gloo and through shared memory."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for group in (dist.group.WORLD, pairs[rank // 2]):
        for memory in (None, connect(group)):
            for one_expert in (False, True):
                check_model(group, memory, one_expert)
            check_empty_rank(group, memory)
            check_fp8(group, memory)
    with pytest.raises(ValueError, match="6 experts do not divide over the 4 ranks"):
        ProcessGroupDispatcher(dist.group.WORLD, 6)
    with pytest.raises(ValueError, match="the dispatcher sends range"):
        DeepseekV3(CONFIG, dispatcher=ProcessGroupDispatcher(dist.group.WORLD, 8))
