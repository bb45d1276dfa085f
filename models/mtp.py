"""Multi-token prediction (MTP): one more layer per additional token (DeepSeek-V3 §2.2).

At every position, depth k takes the normalized hidden state of depth k - 1 (depth 0 is the model) and the embedding of
the token k positions ahead. It predicts the token k + 1 positions ahead through the model's own head. Embedding and
head are the model's tensors, not copies.

Notable: the projection's input is the embedding first and the hidden state second, as in the published weights (the
paper's equation 21 has the opposite order). The hidden state is taken *after* the last norm, as in vLLM, SGLang and
transformers.

Shapes: B batch, T tokens, D hidden size.
"""

import torch
from torch import Tensor, nn

from moray.models.config import ModelConfig
from moray.models.decoder import DecoderLayer
from moray.models.expert_parallel.stages import Dispatcher
from moray.models.linear import Linear, RMSNorm


class MTPHead(nn.Module):
    """The norm before the shared head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """A decoder layer whose input combines the previous depth's hidden state with the next token's embedding."""

    def __init__(self, config: ModelConfig, index: int, experts: range, dispatcher: Dispatcher) -> None:
        super().__init__(config, index, experts, dispatcher)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = MTPHead(config)

    def join(self, hidden_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        """The layer's input."""
        joined_BTD: Tensor = self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), dim=-1))
        return joined_BTD


def shift_left(values_BT: Tensor, places: int, filler: int) -> Tensor:
    """Shifts each row left by `places`; `filler` fills the right end."""
    moved_BT = torch.full_like(values_BT, filler)
    if places < values_BT.shape[1]:
        moved_BT[:, : values_BT.shape[1] - places] = values_BT[:, places:]
    return moved_BT
