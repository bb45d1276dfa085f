"""Multi-head latent attention (DeepSeek-V2 §2.1.2-2.1.3, DeepSeek-V3 §2.1.1), in training and over the cache.

Keys and values of all heads are computed from one latent of `kv_lora_rank` elements per token. A decoupled rotary part
encodes the position. In training, keys and values are materialized. Over the cache, `kv_b_proj` is absorbed: q^T (W_k
c) = (W_k^T q)^T c, so a query is projected into the latent space once and attends to the cached latents themselves, one
shared "head" of latent + rope elements. The values' half of `kv_b_proj` is applied to the result.

Notable: the norms within the latents use eps 1e-6 whatever `rms_norm_eps` is, as in transformers and DeepSeek's own
code. (vLLM uses `rms_norm_eps`. DeepSeek's models all set it to 1e-6, so the two agree.)

Shapes: B batch, T tokens, H heads, N elements without position, P rotated elements, Q = P / 2 pairs, V elements of a
value head, C latent elements, D hidden size.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moray.kernels.attention import attention_backend, causal_attention, pad_values
from moray.kernels.mla_decode import mla_decode
from moray.kernels.rope import rope
from moray.kernels.util.document_bounds import DocumentBounds
from moray.models.cache import CacheView
from moray.models.config import ModelConfig
from moray.models.linear import Linear, RMSNorm, linear_outputs
from moray.models.recompute import Recompute

LATENT_EPS = 1e-6  # of the norms within the latents


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of the tokens' angles; computed once per forward, for all layers."""

    cos_BTQ: Tensor
    sin_BTQ: Tensor

    def rotate(self, x_BTHP: Tensor) -> Tensor:
        return rope(x_BTHP, self.cos_BTQ, self.sin_BTQ)


class LatentAttention(nn.Module):
    """One layer's attention. If `q_lora_rank` is None, queries are projected directly from the hidden state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        self.scale = config.softmax_scale

    def forward(
        self, x_BTD: Tensor, rotary: RotaryTable, documents: DocumentBounds | None, recompute: Recompute
    ) -> Tensor:
        """Causal attention within the rows, or within their documents."""
        q_low, kv_low = self._down(x_BTD)
        q_BTHA, k_BTHA, v_BTHA = recompute.run(partial(self._up, rotary), q_low, kv_low)
        out_BTHA = causal_attention(q_BTHA, k_BTHA, v_BTHA, self.scale, documents)
        out_BTD: Tensor = self.o_proj(out_BTHA[..., : self.config.v_head_dim].flatten(-2))
        return out_BTD

    def _down(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of queries, and of keys and values. They are small if queries have a latent of their own."""
        queries = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
        q_low, kv_low = linear_outputs(x_BTD, queries, self.kv_a_proj_with_mqa)
        return q_low, kv_low

    def _up(self, rotary: RotaryTable, q_low: Tensor, kv_low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of all heads, [B, T, H, A] each, and values. For the reference, values are padded to A."""
        heads = self.config.num_attention_heads
        q_nope_BTHN, q_rope_BTHP = self._queries(q_low, rotary)
        latent_BTC, k_rope_BT1P = self._latents(kv_low, rotary)
        kv = self.kv_b_proj(latent_BTC).unflatten(-1, (heads, -1))
        k_nope_BTHN, v_BTHV = kv.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=-1)
        q_BTHA = torch.cat((q_nope_BTHN, q_rope_BTHP), dim=-1)
        k_BTHA = torch.cat((k_nope_BTHN, k_rope_BT1P.expand(-1, -1, heads, -1)), dim=-1)
        if attention_backend(v_BTHV) == "reference":
            v_BTHV = pad_values(v_BTHV, self.config.qk_head_dim)
        return q_BTHA, k_BTHA, v_BTHV.contiguous()

    def forward_cached(self, x_BTD: Tensor, rotary: RotaryTable, view: CacheView, layer: int) -> Tensor:
        """Writes the tokens' latents into the cache, then attends over all positions up to each token's own."""
        q_low, kv_low = self._down(x_BTD)
        latent_BTC, k_rope_BT1P = self._latents(kv_low, rotary)
        view.write(layer, torch.cat((latent_BTC, k_rope_BT1P.squeeze(2)), dim=-1))
        q_nope_BTHN, q_rope_BTHP = self._queries(q_low, rotary)
        w_key_HNC, w_value_HVC = self._absorbed_weights(x_BTD.dtype)
        q_BTHC = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope_BTHN, w_key_HNC), q_rope_BTHP), dim=-1)
        mixed_BTHC = mla_decode(
            q_BTHC, view.blocks(layer), view.tables_BN, view.positions_BT, self.scale, self.config.kv_lora_rank
        )
        out_BTHV = torch.einsum("bthc,hvc->bthv", mixed_BTHC, w_value_HVC)
        out_BTD: Tensor = self.o_proj(out_BTHV.flatten(-2))
        return out_BTD

    def _absorbed_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two halves of `kv_b_proj` by head, as views: w_key_HNC, w_value_HVC."""
        stacked = torch.unflatten(self.kv_b_proj.weight_in(dtype), 0, (self.config.num_attention_heads, -1))
        w_key_HNC, w_value_HVC = torch.split(stacked, [self.config.qk_nope_head_dim, self.config.v_head_dim], dim=1)
        return w_key_HNC, w_value_HVC

    def _queries(self, q_low: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        q = q_low if self.config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(q_low))
        q_nope_BTHN, q_rope_BTHP = q.unflatten(-1, (self.config.num_attention_heads, -1)).split(
            [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1
        )
        return q_nope_BTHN, rotary.rotate(q_rope_BTHP)

    def _latents(self, kv_low: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        """The normalized latent and the rotated key, as stored in the cache."""
        latent_BTC, k_rope_BTP = torch.split(kv_low, [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent_BTC), rotary.rotate(k_rope_BTP.unsqueeze(2))
