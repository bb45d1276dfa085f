"""The flat layout of optimizer state: every element of every logical tensor once, and no block is split."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels import quantize
from moray.models.config import ModelConfig
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.initial_state import draw_weights
from moray.pipelines.pretrain.layout import BLOCK
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.flat import FlatGroup, flat_groups
from moray.pipelines.pretrain.optim.optimizer import PlainOptimizer, sharded_optimizer
from moray.pipelines.pretrain.validate import check_blocks
from tests.examples import examples

SMALL = dataclasses.replace(preset("tiny"), vocab_size=40, num_hidden_layers=2, n_routed_experts=4, n_group=2)


def config_of(hidden: int, inner: int) -> ModelConfig:
    return dataclasses.replace(SMALL, hidden_size=hidden, intermediate_size=hidden + 1, moe_intermediate_size=inner)


def groups_of(config: ModelConfig, world: int, ep: int) -> list[FlatGroup]:
    mesh = Mesh(rank=0, world=world, ep=ep, ep_group=None, edp_group=None)
    return flat_groups(DeepseekV3(config), mesh)


@settings(max_examples=examples(25))
@given(st.integers(2, 20), st.integers(1, 9), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (8, 2)]))
def test_partitions_hold_every_element_once(hidden: int, inner: int, layout: tuple[int, int]) -> None:
    world, ep = layout
    config = config_of(2 * hidden, inner)
    groups = groups_of(config, world, ep)
    model = DeepseekV3(config)
    seen: dict[str, torch.Tensor] = {
        n: torch.zeros(v.numel(), dtype=torch.int) for n, v, _ in model.logical_parameters()
    }
    for group in groups:
        assert group.replicas == (world // ep if group.expert else world)
        assert all(start % BLOCK == 0 for start in group.starts)
        assert group.partition % BLOCK == 0
        assert sum(p.numel() for p in group.parameters) + sum(group.gaps) == group.numel
        for rank in range(group.replicas):
            held = 0
            for piece in group.pieces(rank * group.partition, (rank + 1) * group.partition):
                assert piece.at >= held
                held = piece.at + piece.numel
                assert piece.total == len(seen[piece.name])
                seen[piece.name][piece.offset : piece.offset + piece.numel] += 1
            assert held <= group.partition
    assert all((count == 1).all() for count in seen.values())


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=examples(25))
def test_sizes_that_are_accepted_for_fp8_moments_put_every_tensor_at_a_block(hidden: int, inner: int) -> None:
    config = config_of(2 * hidden, inner)
    fits = all(t.start % BLOCK == 0 for group in groups_of(config, 2, 1) for t in group.logical)
    if 2 * hidden * inner % BLOCK:
        with pytest.raises(ValueError, match=f"{2 * hidden} x {inner}"):
            check_blocks(config)
    else:
        check_blocks(config)
        assert fits


def test_the_block_size_is_that_of_the_kernels() -> None:
    assert BLOCK == quantize.BLOCK


def test_norms_do_not_decay_and_experts_are_apart() -> None:
    groups = {group.name: group for group in groups_of(SMALL, 4, 2)}
    assert [name for name, group in groups.items() if group.decays] == ["dense", "experts"]
    assert all(t.name.endswith("norm.weight") for t in groups["vectors"].logical)
    assert all(".mlp.experts." in t.name for t in groups["experts"].logical)


def test_weights_and_gradients_are_views_of_flat_buffers() -> None:
    with torch.device("meta"):
        model = DeepseekV3(SMALL)
    model.allocate_buffers(torch.device("cpu"))
    optimizer = sharded_optimizer(model, Mesh.alone(), PretrainConfig(steps=1), torch.device("cpu"))
    assert isinstance(optimizer, PlainOptimizer)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    draw_weights(optimizer, SMALL.initializer_range, 3)
    optimizer.refresh_weights()
    drawn = DeepseekV3(SMALL)
    drawn.init_weights(3)
    before = {name: view.clone() for name, view, _ in drawn.logical_parameters()}
    for name, view, _ in model.logical_parameters():
        assert torch.equal(view, before[name])
    ids = torch.arange(16).view(2, 8)
    optimizer.backward(model.training_loss(ids, ids.flip(1)).main, last=True)
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert float(optimizer.clip(1.0)) == pytest.approx(squares**0.5, rel=1e-5)
    fragments = {fragment.name: fragment.tensor for fragment in optimizer.fragments() if fragment.kind == "master"}
    optimizer.step(1e-2)
    for name, view, _ in model.logical_parameters():
        assert torch.equal(view.flatten(), fragments[name])
        assert not torch.equal(view, before[name]) or name.endswith("embed_tokens.weight")
