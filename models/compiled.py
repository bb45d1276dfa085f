"""A model whose forward over the latent cache is compiled (`kernels/cached_step.c`), for inference on CPUs.

Notable: weights are packed as they are read, a matrix or a stack of experts at a time, and the originals are not kept.
Activations, norms and the cache are FP32 whatever the weights' form; routers are FP32 unless it is INT8.

Shapes: V vocabulary, W rows whose logits are wanted, L layers, E experts, D hidden size, N elements of a head without
position, C latent elements, P rotated elements.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moray.kernels import cached_step
from moray.kernels.cached_step import FORMATS, GROUP, CMatrix, HugePages, pack, padded
from moray.kernels.rope import rope_table
from moray.models.attention import LATENT_EPS
from moray.models.cache import LatentCache
from moray.models.checkpoint import CheckedFolder
from moray.models.config import ModelConfig
from moray.models.model import DeepseekV3
from moray.models.rows import RowLogits, Span

Read = Callable[[str], Tensor]  # a tensor in high precision by its canonical name


class CompiledModel:
    """weights: the form of matrices, "float32", "bfloat16" or "int8" (with a scale per output). threads: that run a
    step together. folder: where the built library is kept. Raises `cached_step.BuildError` if it cannot be built."""

    def __init__(
        self, config: ModelConfig, read: Read, folder: Path, weights: str = "float32", threads: int = 1
    ) -> None:
        self.config = config
        self._library = cached_step.library(folder)
        self._kept: list[Tensor] = []
        self._model = _Packer(config, read, weights, self._kept).model()
        self._threads = threads
        self._team = self._library.cached_step_start(threads)
        self._scratch, self._logits, self._hidden = torch.empty(0), torch.empty(0), torch.empty(0)
        self._rows_LE = torch.zeros(config.num_hidden_layers, config.n_routed_experts, dtype=torch.int64)
        self.element_bytes = 4

    @classmethod
    def from_folder(cls, path: Path, folder: Path, weights: str = "float32", threads: int = 1) -> CompiledModel:
        """The model of a Hugging Face folder, without multi-token prediction. Raises the errors of `CheckedFolder`."""
        source = CheckedFolder(path, mtp=False)
        source.check_copies()
        return cls(source.config, source.read_wide, folder, weights, threads)

    @classmethod
    def of(cls, model: DeepseekV3, folder: Path, weights: str = "float32", threads: int = 1) -> CompiledModel:
        """A model in memory, whose weights are high precision."""
        tensors = {name: view for name, view, _ in model.logical_parameters()} | dict(model.logical_biases())
        return cls(model.config, tensors.__getitem__, folder, weights, threads)

    def close(self) -> None:
        """Ends the threads."""
        if self._team is not None:
            self._library.cached_step_end(self._team)
            self._team = None

    def __del__(self) -> None:
        if getattr(self, "_team", None) is not None:
            self.close()

    def packed(self) -> Sequence[Tensor]:
        """The packed weights, in the order of layers and experts."""
        return self._kept

    def expert_rows(self) -> Tensor:
        return self._rows_LE

    def cache(self, blocks: int, block_size: int) -> LatentCache:
        """Latents of 16 positions are interleaved in it. Raises ValueError for another block size than a multiple."""
        if block_size % GROUP:
            raise ValueError(f"block_size = {block_size} must be a multiple of {GROUP}")
        return LatentCache(self.config, blocks, block_size)

    def forward(self, spans: Sequence[Span], cache: LatentCache) -> RowLogits:
        """`RowModel.forward`."""
        ids, positions, table, tables, chosen = (array("i") for _ in range(5))
        for span in spans:
            count = len(span.ids)
            ids.extend(span.ids)
            positions.extend(range(span.start, span.start + count))
            table.extend([len(tables)] * count)
            tables.extend(span.table)
            chosen.extend(range(len(ids) - span.wanted, len(ids)))
        best, width = array("i", [0]) * len(chosen), padded(self.config.vocab_size)
        needed = self._library.cached_step_floats(self._model, len(ids), self._threads)
        self._scratch = _room(self._scratch, needed)
        self._logits = _room(self._logits, len(chosen) * width)
        deep = padded(self.config.hidden_size)
        self._hidden = _room(self._hidden, len(chosen) * deep)
        batch = cached_step.CBatch(
            len(ids), len(chosen), cache.block_size, self.config.vocab_size,
            *(values.buffer_info()[0] for values in (ids, positions, table, tables, chosen)),
            cache.storage.data_ptr(), cache.storage.stride(0), self._logits.data_ptr(), self._hidden.data_ptr(),
            best.buffer_info()[0],
            self._rows_LE.data_ptr(),
        )  # fmt: skip
        self._library.cached_step(self._team, self._model, batch, self._scratch.data_ptr())
        logits_WV = self._logits[: len(chosen) * width].view(-1, width)[:, : self.config.vocab_size]
        hidden_WD = self._hidden[: len(chosen) * deep].view(-1, deep)[:, : self.config.hidden_size]
        return RowLogits(logits_WV, best.tolist(), hidden_WD)


def _room(buffer: Tensor, needed: int) -> Tensor:
    """The buffer, or a larger one."""
    return buffer if len(buffer) >= needed else torch.empty(needed)


class _Packer:
    """Fills the structs; every tensor that they point to is appended to `kept`."""

    def __init__(self, config: ModelConfig, read: Read, weights: str, kept: list[Tensor]) -> None:
        self._config, self._read, self._form, self._kept = config, read, weights, kept
        self._memory = HugePages()

    def model(self) -> cached_step.CModel:
        config, model = self._config, cached_step.CModel()
        shared = config.n_shared_experts * config.moe_intermediate_size if config.moe_layers else 0
        dense = config.intermediate_size if config.first_k_dense_replace else 0
        for name, value in {
            "hidden": config.hidden_size, "layers": config.num_hidden_layers, "heads": config.num_attention_heads,
            "nope": config.qk_nope_head_dim, "rope": config.qk_rope_head_dim, "value": config.v_head_dim,
            "latent": config.kv_lora_rank, "q_rank": config.q_lora_rank or 0, "inner": max(shared, dense),
            "expert_inner": config.moe_intermediate_size, "vocab": config.vocab_size,
            "score_scale": config.softmax_scale, "eps": config.rms_norm_eps, "latent_eps": LATENT_EPS,
        }.items():  # fmt: skip
            setattr(model, name, value)
        model.router = cached_step.CRouter(
            config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group,
            config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip
        embedding = self._read("model.embed_tokens.weight")
        wide = self._form == "float32"
        model.embedding_format = FORMATS["float32" if wide else "bfloat16"]
        model.embedding = self._keep(embedding.to(torch.float32 if wide else torch.bfloat16))
        model.rotary = self._keep(self._rotary())
        model.final_norm = self._vector("model.norm.weight")
        model.head = self._matrix(self._read("lm_head.weight"))
        layers = (cached_step.CLayer * config.num_hidden_layers)()
        for index in range(config.num_hidden_layers):
            self._layer(layers[index], index)
        model.layer = layers
        return model

    def _layer(self, layer: cached_step.CLayer, index: int) -> None:
        config, prefix = self._config, f"model.layers.{index}."
        attention = f"{prefix}self_attn."

        def weight(name: str) -> CMatrix:
            return self._matrix(self._read(f"{prefix}{name}.weight"))

        layer.attention_norm = self._vector(f"{prefix}input_layernorm.weight")
        layer.mlp_norm = self._vector(f"{prefix}post_attention_layernorm.weight")
        layer.kv_norm = self._vector(f"{attention}kv_a_layernorm.weight")
        if config.q_lora_rank is None:
            layer.q_b = weight("self_attn.q_proj")
        else:
            layer.q_a, layer.q_b = weight("self_attn.q_a_proj"), weight("self_attn.q_b_proj")
            layer.q_norm = self._vector(f"{attention}q_a_layernorm.weight")
        layer.kv_a, layer.o = weight("self_attn.kv_a_proj_with_mqa"), weight("self_attn.o_proj")
        stacked = torch.unflatten(self._read(f"{attention}kv_b_proj.weight"), 0, (config.num_attention_heads, -1))
        keys_HNC, values_HVC = torch.split(stacked, [config.qk_nope_head_dim, config.v_head_dim], dim=1)
        layer.key, layer.value = (
            self._stack(len(keys_HNC), keys_HNC.transpose(1, 2)),
            self._stack(len(values_HVC), values_HVC),
        )
        layer.moe = index in config.moe_layers
        mlp = "mlp.shared_experts." if layer.moe else "mlp."
        if not layer.moe or config.n_shared_experts:
            layer.gate, layer.up, layer.down = (weight(f"{mlp}{name}_proj") for name in ("gate", "up", "down"))
        if layer.moe:
            self._experts(layer, f"{prefix}mlp.")

    def _experts(self, layer: cached_step.CLayer, prefix: str) -> None:
        layer.bias = self._vector(f"{prefix}gate.e_score_correction_bias")
        # With a scale for each expert, held-out bits stay within 0.1 % (`benchmarks/serving_quality.py`).
        layer.router = self._matrix(self._read(f"{prefix}gate.weight"), "int8" if self._form == "int8" else "float32")
        for name in ("gate", "up", "down"):
            experts = range(self._config.n_routed_experts)
            weights = (self._read(f"{prefix}experts.{expert}.{name}_proj.weight") for expert in experts)
            setattr(layer, f"e_{name}", self._stack(len(experts), weights))

    def _matrix(self, weight: Tensor, form: str = "") -> CMatrix:
        return self._stack(1, [weight], form)

    def _stack(self, count: int, weights: Iterable[Tensor], form: str = "") -> CMatrix:
        """`count` matrices of one shape, one after the other. Each is packed into its place, so that only one is held
        twice: the experts of a layer of V3 are 15 GB in FP32."""
        form = form or self._form
        panels, scales, shape = torch.empty(0), [], torch.Size()
        for number, weight in enumerate(weights):
            part, scale = pack(weight, form)
            if not number:
                panels, shape = self._memory.empty((count, *part.shape), part.dtype), weight.shape
            panels[number] = part
            scales += [] if scale is None else [scale]
        self._kept.append(panels)
        return CMatrix(panels.data_ptr(), self._keep(torch.cat(scales)) if scales else None, *shape, FORMATS[form])

    def _vector(self, name: str) -> int:
        vector = self._read(name).float()
        return self._keep(torch.nn.functional.pad(vector, (0, padded(len(vector)) - len(vector))))

    def _rotary(self) -> Tensor:
        config, yarn = self._config, self._config.rope_scaling
        positions = torch.arange(config.max_position_embeddings).unsqueeze(0)
        dim, theta = config.qk_rope_head_dim, config.rope_theta
        more = () if yarn is None else (yarn.frequency_scales(dim, theta), yarn.rotary_magnitude)
        return torch.stack([table[0] for table in rope_table(positions, dim, theta, torch.float32, *more)], dim=-1)

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(self._memory.keep(tensor))
        return self._kept[-1].data_ptr()
