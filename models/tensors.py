"""The logical tensors of a model: canonical names and shapes, from the config alone.

The names are Hugging Face's for DeepSeek-V3, one per parameter and one per expert. They do not depend on the layout of
experts over ranks, so initialization, checkpoints and exports all use them. Pure Python, no torch.
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


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """The trained parameters of one layer, by their names within it."""
    row = (config.hidden_size,)
    shapes: dict[str, Shape] = {"input_layernorm.weight": row}
    shapes |= {f"self_attn.{name}": shape for name, shape in _attention(config)}
    shapes["post_attention_layernorm.weight"] = row
    shapes |= {f"mlp.{name}": shape for name, shape in _mlp(config, layer)}
    if layer in config.mtp_layers:
        shapes |= {"enorm.weight": row, "hnorm.weight": row, "shared_head.norm.weight": row}
        shapes["eh_proj.weight"] = (config.hidden_size, 2 * config.hidden_size)
    return shapes


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every trained parameter by canonical name."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.mtp_layers.stop):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(config, layer).items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def bias_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The routers' correction biases by canonical name. They are updated by a rule, not by a gradient."""
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    return {name.format(layer): (config.n_routed_experts,) for layer in config.moe_layers}


def shared_tensors(config: ModelConfig) -> dict[str, str]:
    """Additional names of a tensor in a Hugging Face folder -> the tensor's canonical name.

    Each multi-token prediction layer has copies of the embedding and the head that it shares with the model.
    """
    shared = {}
    for layer in config.mtp_layers:
        shared[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        shared[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return shared


def is_quantized(name: str) -> bool:
    """Whether the official FP8 format quantizes this parameter: the linear layers of attention and MLPs, but not the
    router, the embedding, the head, or the projection of multi-token prediction."""
    return name.endswith(("_proj.weight", ".kv_a_proj_with_mqa.weight")) and not name.endswith(".eh_proj.weight")


def scale_name(name: str) -> str:
    """Name of the scales of an FP8 parameter."""
    return f"{name}_scale_inv"


def scale_shape(shape: Shape) -> Shape:
    """One scale per block of 128 x 128."""
    return tuple(-(-size // 128) for size in shape)


def stored_tensors(config: ModelConfig, precision: str) -> dict[str, tuple[str, Shape]]:
    """Name -> (safetensors dtype, shape) of all tensors in a Hugging Face folder, in order.

    precision: "float32", "bf16" or "fp8" (linear layers in E4M3 with scales, the rest in BF16). Router biases are FP32.
    """
    high_precision = "F32" if precision == "float32" else "BF16"
    copies: dict[str, list[str]] = {}
    for copy, source in shared_tensors(config).items():
        copies.setdefault(source, []).append(copy)
    stored = {}
    for name, shape in parameter_shapes(config).items():
        in_fp8 = precision == "fp8" and is_quantized(name)
        for each in (name, *copies.get(name, ())):
            stored[each] = ("F8_E4M3" if in_fp8 else high_precision, shape)
        if in_fp8:
            stored[scale_name(name)] = ("F32", scale_shape(shape))
    return stored | {name: ("F32", shape) for name, shape in bias_shapes(config).items()}


def checkpoint_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All tensors of the model's checkpoint: parameters and biases."""
    return parameter_shapes(config) | bias_shapes(config)
