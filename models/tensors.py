"""The logical tensors of a model: canonical names and shapes, from the config alone.

The names are Hugging Face's for DeepSeek-V3, one per parameter and one per expert. They do not depend on how a run
lays its experts out, so initialisation, checkpoints and exports all key on them. Pure Python, no torch.
"""

from collections.abc import Iterator

from moray.models.config import ModelConfig

Shape = tuple[int, ...]


def _attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield "q_proj.weight", (queries, hidden)
    else:
        yield "q_a_proj.weight", (config.q_lora_rank, hidden)
        yield "q_a_layernorm.weight", (config.q_lora_rank,)
        yield "q_b_proj.weight", (queries, config.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", (config.kv_lora_rank + config.qk_rope_head_dim, hidden)
    yield "kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield "kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield "o_proj.weight", (hidden, heads * config.v_head_dim)


def _swiglu(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate_proj.weight", (inner, hidden)
    yield f"{prefix}up_proj.weight", (inner, hidden)
    yield f"{prefix}down_proj.weight", (hidden, inner)


def _mlp(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if layer not in config.moe_layers:
        yield from _swiglu("", hidden, config.intermediate_size)
        return
    yield "gate.weight", (config.n_routed_experts, hidden)
    for expert in range(config.n_routed_experts):
        yield from _swiglu(f"experts.{expert}.", hidden, inner)
    if config.n_shared_experts:
        yield from _swiglu("shared_experts.", hidden, inner * config.n_shared_experts)


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every trained parameter by canonical name."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (config.hidden_size,)
        shapes |= {f"{prefix}.self_attn.{name}": shape for name, shape in _attention(config)}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (config.hidden_size,)
        shapes |= {f"{prefix}.mlp.{name}": shape for name, shape in _mlp(config, layer)}
    shapes["model.norm.weight"] = (config.hidden_size,)
    shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def bias_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The routers' correction biases by canonical name: state that a rule moves, not a gradient."""
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    return {name.format(layer): (config.n_routed_experts,) for layer in config.moe_layers}


def checkpoint_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Everything that a checkpoint of the model holds: parameters and biases."""
    return parameter_shapes(config) | bias_shapes(config)
