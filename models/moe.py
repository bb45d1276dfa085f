"""The mixture of experts: router, dispatcher, expert shard, shared expert (DeepSeek-V3 §2.1.2).

Notable: the router computes in FP32 whatever the model's dtype (in BF16, scores that differ by less than 0.4 % are
equal). Its correction bias stays FP32 through `.to(bfloat16)`, because steps of 0.001 would vanish in BF16. The counts
for the bias update accumulate only in training with gradients, so evaluation cannot change the balance.

Shapes: T tokens, R rows of tokens without padding, or at the local experts; K slots, E experts, L local experts, D
hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moray.kernels.quantize import quantize_rows_int8
from moray.kernels.router import route, weigh
from moray.kernels.sequence_balance import sequence_balance
from moray.kernels.wide_linear import wide_linear
from moray.models.compute import SwiGLUCompute, UnfusedSwiGLU
from moray.models.config import ModelConfig
from moray.models.expert_parallel.stages import (
    DEFAULT_CONTEXT,
    Dispatcher,
    DispatchHandle,
    ExpertRows,
    Routing,
    RoutingContext,
)
from moray.models.expert_shard import ExpertShard
from moray.models.linear import ExactModule, Linear, unset_parameter


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense MLP and the shared expert. `compute` is its strategy (`compute.py`)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner)
        self.up_proj = Linear(hidden, inner)
        self.down_proj = Linear(inner, hidden)
        self.compute: SwiGLUCompute = UnfusedSwiGLU()

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.compute(x_TD, self.gate_proj, self.up_proj, self.down_proj)


class Router(ExactModule):
    """Scores tokens against experts and chooses `num_experts_per_tok` of them."""

    e_score_correction_bias: Tensor
    counts_E: Tensor
    weight_scale_E1: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = unset_parameter(config.n_routed_experts, config.hidden_size)
        self.register_buffer("weight_scale_E1", None, persistent=False)
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)
        counts_E = torch.zeros(config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("counts_E", counts_E, persistent=False)

    def forward(self, rows_TD: Tensor, sequences: int, context: RoutingContext = DEFAULT_CONTEXT) -> Routing:
        """Routes the tokens of `sequences` sequences of equal length, without padding. If `context.forced_ids_TK` is
        given, it determines the experts, and the router only their weights."""
        compute_dtype = torch.float64 if rows_TD.dtype == torch.float64 else torch.float32
        weight_ED = self.weight.to(compute_dtype)
        if self.weight_scale_E1 is not None:
            weight_ED = weight_ED * self.weight_scale_E1
        logits_TE = wide_linear(rows_TD, weight_ED)
        ids_RK, weights_RK, counts_E = self._route(logits_TE, context)
        balance = None
        if self.training and (torch.is_grad_enabled() or context.run == "first"):
            if context.run != "again":
                self._count(ids_RK, counts_E, context)
            counted_T = context.counted(len(logits_TE), logits_TE.device)
            top_k = self.config.num_experts_per_tok
            balance = sequence_balance(logits_TE, top_k, sequences, counted_T, context.weights_B)
        return Routing(ids_RK, weights_RK, counts_E, balance)

    def _count(self, ids_RK: Tensor, counts_E: Tensor, context: RoutingContext) -> None:
        if context.counted_T is not None:
            ones_RK = context.gather(context.counted_T).unsqueeze(-1).expand_as(ids_RK).to(counts_E.dtype)
            counts_E = torch.zeros_like(counts_E).scatter_add_(0, ids_RK.flatten(), ones_RK.flatten())
        self.counts_E += counts_E

    def _route(self, logits_TE: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor]:
        normalise, scale = self.config.norm_topk_prob, self.config.routed_scaling_factor
        logits_RE = context.gather(logits_TE)
        if context.forced_ids_TK is not None:
            forced_ids_RK = context.gather(context.forced_ids_TK)
            return forced_ids_RK, *weigh(logits_RE, forced_ids_RK, normalise=normalise, scale=scale)
        return route(
            logits_RE,
            self.e_score_correction_bias,
            top_k=self.config.num_experts_per_tok,
            n_group=self.config.n_group,
            topk_group=self.config.topk_group,
            normalise=normalise,
            scale=scale,
        )

    def store_int8(self) -> None:
        """Stores the weight in INT8 with a scale per expert, for inference."""
        int8_ED, self.weight_scale_E1 = quantize_rows_int8(self.weight.detach())
        self.weight = nn.Parameter(int8_ED, requires_grad=False)

    def exact_tensors(self) -> Iterable[str]:
        return ("e_score_correction_bias",) + (() if self.weight_scale_E1 is None else ("weight_scale_E1",))


class MoE(nn.Module):
    """Routed experts, of which this rank holds a shard, and the shared expert, which processes every token."""

    def __init__(self, config: ModelConfig, index: int, experts: range, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.index, self.dispatcher = index, dispatcher
        self.gate = Router(config)
        self.experts = ExpertShard(experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts: SwiGLU | None = None
        if config.n_shared_experts:
            inner = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = SwiGLU(config.hidden_size, inner)

    def route(self, rows_TD: Tensor, sequences: int, context: RoutingContext = DEFAULT_CONTEXT) -> Routing:
        routing: Routing = self.gate(rows_TD, sequences, context)
        return routing

    def dispatch(self, rows_TD: Tensor, routing: Routing) -> DispatchHandle:
        return self.dispatcher.dispatch(rows_TD, routing, fp8=self.experts.compute.fp8_rows, layer=self.index)

    def local(self, rows_TD: Tensor) -> Tensor | None:
        """The shared expert's output, if there is one."""
        return None if self.shared_experts is None else self.shared_experts(rows_TD)

    def compute(self, rows: ExpertRows) -> Tensor:
        """The outputs of the local experts, times the router's weights: [R, D]."""
        out_RD: Tensor = self.experts(rows)
        return out_RD
