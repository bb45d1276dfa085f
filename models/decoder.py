"""One decoder layer: attention, then a dense MLP or a mixture of experts, in the stages of `expert_parallel/stages.py`.

Shapes: B batch, T tokens (of a row with B, of the flattened batch without), L local experts, R rows, D hidden size.
"""

from collections.abc import Callable
from functools import reduce
from operator import add

from torch import Tensor, nn

from moray.kernels.util.document_bounds import DocumentBounds
from moray.models.attention import LatentAttention, RotaryTable
from moray.models.cache import CacheView
from moray.models.config import ModelConfig
from moray.models.expert_parallel.stages import Attended, Dispatcher, DispatchHandle, ExpertRows, RoutingContext
from moray.models.linear import RMSNorm
from moray.models.moe import MoE, SwiGLU
from moray.models.recompute import Recompute

Attend = Callable[[LatentAttention, Tensor, Recompute], Tensor]


def attend_rows(
    attention: LatentAttention,
    x_BTD: Tensor,
    recompute: Recompute,
    *,
    rotary: RotaryTable,
    documents: DocumentBounds | None,
) -> Tensor:
    """Attention in training; an `Attend` once its keywords are bound."""
    return attention.forward(x_BTD, rotary, documents, recompute)


def attend_cached(
    attention: LatentAttention, x_BTD: Tensor, _: Recompute, *, rotary: RotaryTable, view: CacheView, layer: int
) -> Tensor:
    """Attention over the cache of one layer; an `Attend` once its keywords are bound."""
    return attention.forward_cached(x_BTD, rotary, view, layer)


class DecoderLayer(nn.Module):
    """Implements `stages.Layer`. `mlp` is a `SwiGLU` in the first dense layers and a `MoE` after them.

    With `recompute`, the outputs of norms and of attention's up-projections are not saved for the backward; with
    `recompute_whole`, nothing but the input is, with `offload` on the host.
    """

    def __init__(self, config: ModelConfig, index: int, experts: range, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.recompute = self.recompute_whole = self.offload = False
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if index in config.moe_layers:
            self.mlp = MoE(config, index, experts, dispatcher)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def attend_route(self, x_BTD: Tensor, attend: Attend, context: RoutingContext) -> Attended:
        with Recompute(self.recompute) as recompute:
            normed_BTD = recompute.run(self.input_layernorm, x_BTD)
            residual_BTD = x_BTD + attend(self.self_attn, normed_BTD, recompute)
            rows_TD = recompute.run(self.post_attention_layernorm, residual_BTD).flatten(0, 1)
            routing = self.mlp.route(rows_TD, len(x_BTD), context) if isinstance(self.mlp, MoE) else None
        return Attended(residual_BTD, rows_TD, routing, recompute, context)

    def dispatch(self, attended: Attended) -> DispatchHandle:
        assert isinstance(self.mlp, MoE)
        assert attended.routing is not None
        return self.mlp.dispatch(attended.context.gather(attended.rows_TD), attended.routing)

    def local(self, attended: Attended) -> Tensor | None:
        with attended.recompute:
            return self.mlp.local(attended.rows_TD) if isinstance(self.mlp, MoE) else self.mlp(attended.rows_TD)

    def experts(self, rows: ExpertRows) -> Tensor:
        assert isinstance(self.mlp, MoE)
        return self.mlp.compute(rows)

    def aggregate(self, attended: Attended, *parts_TD: Tensor | None) -> Tensor:
        with attended.recompute as recompute:
            out_TD = reduce(add, (part_TD for part_TD in parts_TD if part_TD is not None))
            recompute.release()
        return attended.residual_BTD + out_TD.view_as(attended.residual_BTD)
