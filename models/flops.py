"""Floating-point operations per token of a DeepSeek-V3 model, and model FLOPs utilization (MFU).

A multiply-add is two operations. Only matrix products count: linear layers with 2 operations per active parameter, and
the two GEMMs of attention, which grow with the context. The backward costs twice the forward. Additional work
(recompute, and multi-token prediction, which is counted separately) is not included in the model's utilization.

Attention is counted in two ways, like published numbers: *non-causal*, every token against the whole row, and *causal*,
against the (T + 1) / 2 visible tokens on average. DeepSeek's "Insights into DeepSeek-V3" (ISCA 2025, table 4) gives
both. Pure Python, no torch.
"""

from dataclasses import dataclass

from moray.models.config import ModelConfig
from moray.models.tensors import layer_shapes

H800_BF16_PEAK = 989.5e12  # dense BF16 operations per second; utilization refers to it also in FP8 training


@dataclass(frozen=True)
class TokenFlops:
    """Operations per token. linear: the forward of all linear layers that process a token, router and head included.
    attention: the forward of scores and weighted values. mtp: the forward of multi-token prediction, including
    attention."""

    linear: float
    attention: float
    mtp: float

    @property
    def forward(self) -> float:
        """Forward of the model without MTP."""
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        """Gradients of the inputs and of the weights: one GEMM each for every GEMM of the forward."""
        return 2 * self.forward

    @property
    def training(self) -> float:
        """Forward and backward of the model without MTP, the basis of utilization."""
        return self.forward + self.backward


def token_flops(config: ModelConfig, sequence_length: int, causal: bool = True) -> TokenFlops:
    """Operations per token, averaged over rows of `sequence_length` tokens."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length = {sequence_length} must be at least 1")
    seen = (sequence_length + 1) / 2 if causal else sequence_length
    attention = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seen
    depths = config.num_nextn_predict_layers
    head = 2 * config.vocab_size * config.hidden_size
    own = sum(_layer_flops(config, layer) for layer in range(config.num_hidden_layers))
    mtp = sum(_layer_flops(config, layer) for layer in config.mtp_layers)
    return TokenFlops(own + head, config.num_hidden_layers * attention, mtp + depths * (head + attention))


def _layer_flops(config: ModelConfig, layer: int) -> int:
    """Operations of the linear layers of one layer, counting only the experts that process a token."""
    matrices = (shape for shape in layer_shapes(config, layer).values() if len(shape) == 2)
    idle_experts = config.n_routed_experts - config.num_experts_per_tok if layer in config.moe_layers else 0
    idle = idle_experts * 3 * config.hidden_size * config.moe_intermediate_size
    return 2 * (sum(rows * columns for rows, columns in matrices) - idle)


@dataclass(frozen=True)
class Utilisation:
    """flops_per_second: of one device, useful work only. share: of its peak."""

    flops_per_second: float
    share: float


def utilisation(
    config: ModelConfig, sequence_length: int, tokens_per_second: float, devices: int, peak: float, causal: bool = True
) -> Utilisation:
    """Training's model FLOPs utilization (Chowdhery et al. 2022, appendix B) at a token rate over all `devices`."""
    rate = token_flops(config, sequence_length, causal).training * tokens_per_second / devices
    return Utilisation(rate, rate / peak)
