import dataclasses

import pytest
import torch

from moray.models.config import ModelConfig
from moray.models.model import DeepseekV3

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=3,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    first_k_dense_replace=1,
    q_lora_rank=10,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    max_position_embeddings=64,
    # Large enough that every part of the model moves the logits.
    initializer_range=0.3,
)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def config():
    """Every feature on, at a few thousand parameters."""
    return CONFIG


@pytest.fixture
def make_model():
    """A model with random weights, norms and biases included; changes to the config by name."""

    def make(dtype=torch.float64, seed=3, **changes):
        model = DeepseekV3(dataclasses.replace(CONFIG, **changes))
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed)
        for name, view, _ in model.logical_parameters():
            if name.endswith("norm.weight"):
                view.uniform_(0.5, 1.5, generator=generator)
        for _, bias_E in model.logical_biases():
            bias_E.uniform_(-0.2, 0.2, generator=generator)
        return model.to(dtype)

    return make


@pytest.fixture
def logical_grads():
    """Gradients by logical name, as views into the owners' gradients."""

    def grads(model):
        return {
            name: owner.grad.as_strided(view.shape, view.stride(), view.storage_offset())
            for name, view, owner in model.logical_parameters()
        }

    return grads
