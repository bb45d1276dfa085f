"""Named model sizes, and parameter counts of configs.

`v3` has the sizes of DeepSeek-V3 (§4.2), `small` those of DeepSeek-V2-Lite with V3's router, and `tiny` trains on two
CPU cores in minutes. Pure Python, no torch.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from moray.models.config import ModelConfig
from moray.models.tensors import Shape, layer_shapes, parameter_shapes

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=2048,
        # The default, 0.006, is for a width of 7168; smaller widths need larger weights for similar activations.
        initializer_range=0.02,
    ),
    "small": ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    "v3": ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=1,
    ),
}


def preset(name: str) -> ModelConfig:
    """The config of that name. Raises ValueError with the nearest name for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model preset {name!r}; expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


@dataclass(frozen=True)
class ParameterCount:
    """total: the model's parameters. active: those used in one token's forward. mtp: those of the multi-token
    prediction layers, which are additional (the embedding and head that they share are not counted again)."""

    total: int
    active: int
    mtp: int


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Counts parameters.

    Active excludes the experts that a token is not routed to, and the embedding table, of which it reads one row. It
    includes the output head. So V3 gives 671.0B, 36.6B and 11.6B, V2-Lite's sizes 15.7B, 2.5B and none.
    """
    mtp = sum(_size(layer_shapes(config, layer)) for layer in config.mtp_layers)
    total = _size(parameter_shapes(config)) - mtp
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    routed = range(config.first_k_dense_replace, config.num_hidden_layers)
    idle = len(routed) * (config.n_routed_experts - config.num_experts_per_tok) * expert
    return ParameterCount(total, total - idle - config.vocab_size * config.hidden_size, mtp)


def _size(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
