"""Floating-point operations per token of a DeepSeek-V3 model, and what share of a machine's peak they are.

A multiply-add is two operations. Only matrix products count: linear maps at 2 operations per active parameter, and the
two products of attention, which grow with the context. The backward is twice the forward. What a run does on top
(recompute, multi-token prediction, which is counted apart) is no useful work and does not enter the model's
utilisation.

Attention is counted in two ways, as published figures are: *non-causal*, every token against the whole row, and
*causal*, against the (T + 1) / 2 tokens that it sees on average. DeepSeek's "Insights into DeepSeek-V3" (ISCA 2025,
table 4) gives both. Pure Python, no torch.
"""

from dataclasses import dataclass

from moray.models.config import ModelConfig
from moray.models.tensors import layer_shapes

H800_BF16_PEAK = 989.5e12  # dense BF16 operations per second; utilisation is quoted against it also for FP8 training


@dataclass(frozen=True)
class TokenFlops:
    """Operations per token. linear: the forward of all linear maps that a token visits, router and head included.
    attention: the forward of scores and mixing. prediction: the forward of multi-token prediction, attention included.
    """

    linear: float
    attention: float
    mtp: float

    @property
    def forward(self) -> float:
        """Of the model itself."""
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        """Gradients of the inputs and of the weights: a product each for every product of the forward."""
        return 2 * self.forward

    @property
    def training(self) -> float:
        """Forward and backward of the model itself: what utilisation is quoted for."""
        return self.forward + self.backward


def token_flops(config: ModelConfig, sequence_length: int, causal: bool = True) -> TokenFlops:
    """Per token, averaged over rows of `sequence_length` tokens."""
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
    """The linear maps of one layer, of the experts those that a token visits."""
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
    """Training's model FLOPs utilisation (Chowdhery et al. 2022, appendix B) at a rate over all `devices`."""
    rate = token_flops(config, sequence_length, causal).training * tokens_per_second / devices
    return Utilisation(rate, rate / peak)
