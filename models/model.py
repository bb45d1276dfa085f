"""DeepSeek-V3 as one module, over the experts that this rank holds.

Notable: the model contains no parallelism. It takes a range of experts and a `Dispatcher` that reaches the others.
Initialization, checkpoints and optimizers use the tensor names of `logical_parameters`, which do not depend on that
range. Weights are drawn per logical name, so a model starts from the same weights in any layout.

Shapes: B batch, T tokens, D hidden size, V vocabulary, N blocks of a cache table, L MoE layers, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moray.kernels.cross_entropy import WeightGradient, cross_entropy_sum
from moray.kernels.rope import rope_table
from moray.kernels.util.deferred import DeferredGradients, gradient_of
from moray.kernels.util.document_bounds import find_documents
from moray.models.attention import RotaryTable
from moray.models.cache import LatentCache
from moray.models.compute import TrainingCompute
from moray.models.config import ModelConfig
from moray.models.decoder import Attend, DecoderLayer, attend_cached, attend_rows
from moray.models.expert_parallel.dispatcher import dispatcher_for
from moray.models.expert_parallel.interleave import Parts, run_alone
from moray.models.expert_parallel.layer_progress import LayerProgress
from moray.models.expert_parallel.stages import DEFAULT_CONTEXT, Dispatcher, Routing, RoutingContext, layer_parts
from moray.models.expert_shard import PROJECTIONS, ExpertShard
from moray.models.fp8 import QuantizationCache
from moray.models.initial import initial_value
from moray.models.linear import Embedding, Linear, RMSNorm
from moray.models.loss import LossWeights, TrainingLoss, add_balance, counted_positions
from moray.models.moe import MoE, Router, SwiGLU
from moray.models.mtp import MTPLayer, shift_left
from moray.models.tensors import is_quantized, scale_name
from moray.models.whole_layer import training_layer_parts


@dataclass(frozen=True)
class ModelOutput:
    """logits_BTV, and the normalized last hidden states from which they are computed, hidden_BTD."""

    logits: Tensor
    hidden: Tensor


class LogicalParameter(NamedTuple):
    """A parameter under its canonical name.

    `view` is a detached, contiguous part of `owner`, which may stack many. It starts at element `view.storage_offset()`
    of the flattened owner, and its gradient at the same element of the owner's gradient.
    """

    name: str
    view: Tensor
    owner: nn.Parameter


class Trunk(nn.Module):
    """Embedding, layers and the last norm; Hugging Face's `model.`."""

    def __init__(self, config: ModelConfig, experts: range, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, index, experts, dispatcher) for index in range(config.num_hidden_layers)]
        layers += [MTPLayer(config, index, experts, dispatcher) for index in config.mtp_layers]
        self.layers: nn.ModuleList = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepseekV3(nn.Module):
    """The language model. Its weights are NaN until `init_weights` or `checkpoint.load` sets them.

    experts: the ids that this rank holds in every MoE layer (all by default). dispatcher: exchanges hidden states with
    the other ranks' experts (local by default, which requires all experts on this rank). Raises ValueError if the two
    do not match.
    """

    def __init__(self, config: ModelConfig, experts: range | None = None, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        everything = range(config.n_routed_experts)
        experts = everything if experts is None else experts
        if not len(experts) or experts.step != 1 or experts[0] not in everything or experts[-1] not in everything:
            raise ValueError(f"experts = {experts} must be consecutive ids of the {len(everything)} experts")
        self.config = config
        self.experts = experts
        dispatcher = dispatcher_for(experts, config.n_routed_experts, dispatcher)
        self.model = Trunk(config, experts, dispatcher)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.progress: LayerProgress | None = None
        self._training_compute = TrainingCompute()

    def forward(self, ids_BT: Tensor, document_ids_BT: Tensor | None = None) -> ModelOutput:
        """Logits of the next token at every position.

        With `document_ids_BT` (runs of equal integers), positions restart and attention stops at each document.
        """
        hidden_BTD, _, _ = run_alone(self._hidden(ids_BT, self._attend(ids_BT, document_ids_BT), self._contexts()))
        output = ModelOutput(self.lm_head(hidden_BTD), hidden_BTD)
        self._end()
        return output

    def loss_sum(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of -log p(target) over the counted tokens, and the number of counted tokens.

        A token counts if its target is not negative (-100, for example) and, if `mask_BT` (bool) is given, its mask is
        true. The full logits are never materialized.
        """
        hidden_BTD, _, _ = run_alone(self._hidden(ids_BT, self._attend(ids_BT, document_ids_BT), self._contexts()))
        summed = self._cross_entropy(hidden_BTD, targets_BT, counted_positions(targets_BT, mask_BT))
        self._end()
        return summed

    def training_loss(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        token_positions_R: Tensor | None = None,
        routes: Sequence[Tensor] | None = None,
        weights: LossWeights | None = None,
    ) -> TrainingLoss:
        """The terms of the training loss, for tokens that count as in `loss_sum`.

        A position counts at MTP depth k if it and the next k positions count. So no prediction crosses a document
        boundary, because a document's first token is never a target. An MTP layer balances the load of the positions
        that count at its depth.

        token_positions_R: int64, positions in the flattened batch that hold a token; the others are padding. Padding is
        sent to no expert and is excluded from the load.

        routes: for each of `routers()`, int64 [B * T, K], the experts of each position, as returned by
        `choose_experts`. By default the routers choose. Raises ValueError if the number of routes differs from the
        number of routers.

        weights: if given, the forward adds the head's gradient to its `.grad`, and a backward of `weights.of(loss)`
        must follow.
        """
        parts = self.training_parts(ids_BT, targets_BT, document_ids_BT, mask_BT, token_positions_R, routes, weights)
        return run_alone(parts)

    def training_parts(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        token_positions_R: Tensor | None = None,
        routes: Sequence[Tensor] | None = None,
        weights: LossWeights | None = None,
    ) -> Parts[TrainingLoss]:
        """`training_loss` as a generator that yields while hidden states are in flight, so that other micro-batches
        compute meanwhile (`expert_parallel/interleave.py`). Their backwards overlap too, if one backward covers the sum
        of the losses."""
        parts = self.routed_parts(ids_BT, targets_BT, document_ids_BT, mask_BT, token_positions_R, routes, weights)
        loss, _ = yield from parts
        return loss

    def routed_parts(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        token_positions_R: Tensor | None = None,
        routes: Sequence[Tensor] | None = None,
        weights: LossWeights | None = None,
    ) -> Parts[tuple[TrainingLoss, list[Routing]]]:
        """`training_parts` that also returns the routings of `routers()`."""
        attend = self._attend(ids_BT, document_ids_BT)
        keep_BT = counted_positions(targets_BT, mask_BT)
        contexts = self._contexts(RoutingContext(token_positions_R, weights_B=keep_BT.sum(1)), routes)
        hidden_BTD, balance, routings = yield from self._hidden(ids_BT, attend, contexts)
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        losses_BT = hidden_BTD.new_empty(keep_BT.shape, dtype=wide)
        scale = None if weights is None else 1.0
        main, count = self._cross_entropy(hidden_BTD, targets_BT, keep_BT, scale, losses_BT)
        sequences_B2 = torch.stack((losses_BT.double().sum(1), keep_BT.sum(1).double()), dim=1)
        depths = self.config.num_nextn_predict_layers
        mtp_scale = None if weights is None or not depths else weights.mtp / depths
        mtp = torch.zeros_like(main)
        chain_BT = keep_BT
        for depth, layer in enumerate(self.mtp_layers(), start=1):
            embedded_BTD = self.model.embed_tokens(shift_left(ids_BT, depth, 0))
            joined_BTD = layer.join(hidden_BTD, embedded_BTD)
            chain_BT = chain_BT & shift_left(keep_BT, depth, 0)
            learning = replace(contexts[self.config.num_hidden_layers + depth - 1], counted_T=chain_BT.flatten())
            x_BTD, routing = yield from training_layer_parts(layer, joined_BTD, attend, learning)
            hidden_BTD = layer.shared_head.norm(x_BTD)
            balance = add_balance(balance, routing)
            if routing is not None:
                routings.append(routing)
            nll, _ = self._cross_entropy(hidden_BTD, shift_left(targets_BT, depth, -100), chain_BT, mtp_scale)
            mtp = mtp + nll / depths
        self._end()
        return TrainingLoss(main, mtp, balance, count, sequences_B2), routings

    def _cross_entropy(
        self,
        hidden_BTD: Tensor,
        targets_BT: Tensor,
        keep_BT: Tensor,
        scale: float | None = None,
        losses_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum of cross entropies and the number of tokens. scale: its factor in the loss, if the forward adds the
        head's gradient. losses_BT: receives the cross entropy of each token."""
        weight_VD = self.lm_head.weight_in(hidden_BTD.dtype)
        into = None
        if scale is not None and torch.is_grad_enabled():
            into = WeightGradient(gradient_of(self.lm_head.weight), scale)
        rows, targets, keep = hidden_BTD.flatten(0, 1), targets_BT.flatten(), keep_BT.flatten()
        losses = None if losses_BT is None else losses_BT.view(-1)
        return cross_entropy_sum(rows, weight_VD, targets, keep, into=into, losses=losses)

    @torch.no_grad()
    def forward_cached(
        self, ids_BT: Tensor, positions_BT: Tensor, cache: LatentCache, tables_BN: Tensor, last_only: bool = False
    ) -> Tensor:
        """Prefill and decode: logits_BTV of the given tokens, or logits_B1V of each row's last token with `last_only`.
        Of `hidden_cached`, by the head."""
        logits: Tensor = self.lm_head(self.hidden_cached(ids_BT, positions_BT, cache, tables_BN, last_only))
        return logits

    def hidden_cached(
        self, ids_BT: Tensor, positions_BT: Tensor, cache: LatentCache, tables_BN: Tensor, last_only: bool = False
    ) -> Tensor:
        """States after the last norm: hidden_BTD of the given tokens, or hidden_B1D of the last ones with `last_only`.

        Writes the tokens' latents at `positions_BT` (ascending in each row) into the blocks of `tables_BN` (int, [B,
        N]) and attends over all positions up to each token's own. Position -1 marks padding, which is not written. Its
        id must be valid, and its state is undefined.
        """
        view = cache.view(positions_BT, tables_BN)
        x_BTD = self.model.embed_tokens(ids_BT)
        rotary = self._rotary(positions_BT.clamp(min=0), x_BTD.dtype)
        for index, layer in enumerate(self._layers()):
            attend = partial(attend_cached, rotary=rotary, view=view, layer=index)
            x_BTD, _ = run_alone(layer_parts(layer, x_BTD, attend))
        if last_only:
            x_BTD = _last_real(x_BTD, positions_BT)
        hidden: Tensor = self.model.norm(x_BTD)
        return hidden

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Sets the initial weights (`initial.py`) and zero biases."""
        for name, view, _ in self.logical_parameters():
            flat = initial_value(name, view.numel(), self.config.initializer_range, seed, view.device)
            view.copy_(flat.view(view.shape))
        for _, bias_E in self.logical_biases():
            bias_E.zero_()

    def allocate_buffers(self, device: torch.device) -> None:
        """Creates the buffers on `device`, zero, for a model that was built on the meta device."""
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device=device))

    def logical_parameters(self) -> Iterator[LogicalParameter]:
        """This rank's parameters by canonical Hugging Face name, one per expert."""
        for name, owner in self.named_parameters():
            prefix, _, attribute = name.rpartition(".")
            if attribute not in PROJECTIONS:
                yield LogicalParameter(name, owner.detach(), owner)
                continue
            for index, expert in enumerate(self.experts):
                logical = f"{prefix}.{expert}.{PROJECTIONS[attribute]}.weight"
                yield LogicalParameter(logical, owner.detach()[index], owner)

    def logical_scales(self) -> Iterator[tuple[str, Tensor]]:
        """The scales of FP8 weights, by the weight's canonical name."""
        for prefix, module in self.named_modules():
            if isinstance(module, Linear) and module.weight_scale_inv is not None:
                yield f"{prefix}.weight", module.weight_scale_inv
            elif isinstance(module, ExpertShard) and module.is_fp8:
                for attribute, projection in PROJECTIONS.items():
                    scales_EIJ = module.get_buffer(scale_name(attribute))
                    for index, expert in enumerate(self.experts):
                        yield f"{prefix}.{expert}.{projection}.weight", scales_EIJ[index]

    def store_fp8(self) -> None:
        """Replaces the weights that the official format quantizes by unset FP8 weights, to be loaded."""
        for prefix, module in self.named_modules():
            if isinstance(module, ExpertShard) or (isinstance(module, Linear) and is_quantized(f"{prefix}.weight")):
                module.store_fp8()

    def quantizations(self) -> Iterator[tuple[QuantizationCache[Any], tuple[nn.Parameter, ...]]]:
        """The caches of quantizations in FP8 training, each with the weights that it quantizes."""
        for module in self.modules():
            cache = getattr(getattr(module, "compute", None), "quantization", None)
            if cache is None:
                continue
            if isinstance(module, SwiGLU):
                yield cache, (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
            elif isinstance(module, ExpertShard):
                yield cache, (module.w_gate_EFD, module.w_up_EFD, module.w_down_EDF)
            elif isinstance(module, Linear):
                yield cache, (module.weight,)

    def logical_biases(self) -> Iterator[tuple[str, Tensor]]:
        """The routers' correction biases by canonical name; FP32, sharing storage with the model."""
        for name, module in self.named_modules():
            if isinstance(module, Router):
                yield f"{name}.e_score_correction_bias", module.e_score_correction_bias

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in order."""
        return [moe.gate for moe in self._mixtures()]

    def shards(self) -> list[ExpertShard]:
        """This rank's expert shards, one per MoE layer, in order."""
        return [moe.experts for moe in self._mixtures()]

    def router_counts(self) -> Tensor:
        """Number of this rank's pairs per expert since the last bias update: [L, E] int64, a copy."""
        counts = [router.counts_E for router in self.routers()]
        return torch.stack(counts) if counts else torch.zeros((0, self.config.n_routed_experts), dtype=torch.int64)

    def reset_counters(self) -> None:
        """Resets the routers' counts and the shards' loads to zero."""
        for router in self.routers():
            router.counts_E.zero_()
        for shard in self.shards():
            shard.load_E.zero_()

    def set_recompute(self, policy: Literal["none", "v3", "layer"] | int, offload: bool = False) -> None:
        """Sets what training recomputes instead of saving. "v3": norms and up-projections of attention
        (`recompute.py`). "layer": all layers, of which only inputs are saved (`whole_layer.py`). A number n: every n-th
        layer, and norms and up-projections in all. offload: keep the inputs of these layers on the host. Results are
        bit-identical."""
        every = policy if isinstance(policy, int) else 1 if policy == "layer" else 0
        for number, layer in enumerate((*self._layers(), *self.mtp_layers()), start=1):
            layer.recompute_whole = bool(every) and number % every == 0
            layer.recompute, layer.offload = policy != "none" and not layer.recompute_whole, offload

    def compute_in(self, dtype: torch.dtype) -> None:
        """Makes the model compute in `dtype` from the embedding on, whatever the dtype of the weights. Routers,
        statistics of norms, softmax and losses stay FP32."""
        self.model.embed_tokens.dtype = dtype

    def add_gradients_in_place(self) -> None:
        """Makes the embedding's backward add to the table's gradient itself. Hooks of the table do not run."""
        self.model.embed_tokens.in_place = True

    def train_in_fp8(self, keep_transposes: bool = True) -> None:
        """Makes the linear layers of attention, MLPs and experts compute in FP8, forward and backward. Embedding, head,
        router, norms, attention's core and the projection of multi-token prediction do not change.

        keep_transposes: of quantized weights, from the first backward until the weights change; else each backward
        makes them.
        """
        self._compute_as(replace(self._training_compute, fp8=True, keep_transposes=keep_transposes))

    def defer_gradients(self, deferred: DeferredGradients | None) -> None:
        """Defers the weight gradients of linear layers and experts: they are complete after `deferred.finish()`. The
        gradients of embedding, head, router and norms are not deferred."""
        self._compute_as(replace(self._training_compute, deferred=deferred))

    def _compute_as(self, chosen: TrainingCompute) -> None:
        """Replaces the strategies of all modules except the head."""
        self._training_compute = chosen
        for name, module in self.named_modules():
            if isinstance(module, ExpertShard):
                module.compute = chosen.experts()
            elif isinstance(module, SwiGLU):
                module.compute = chosen.swiglu()
            elif isinstance(module, Linear) and module is not self.lm_head:
                quantized = is_quantized(f"{name}.weight") and ".mlp." not in name
                module.compute = chosen.linear(quantized, shared_input=name.endswith(".o_proj"))

    def stage_of(self, name: str) -> int:
        """The stage (`layer_progress.py`) that uses a parameter, by its name: its layer; -1 for the embedding, which
        multi-token prediction uses too; the number of layers for everything after them."""
        kind, _, rest = name.removeprefix("model.").partition(".")
        if kind == "layers":
            return min(int(rest.partition(".")[0]), self.config.num_hidden_layers)
        return -1 if kind == "embed_tokens" else self.config.num_hidden_layers

    def mtp_layers(self) -> Iterator[MTPLayer]:
        """The multi-token prediction layers, nearest token first."""
        for layer in self.model.layers:
            if isinstance(layer, MTPLayer):
                yield layer

    def _layers(self) -> Iterator[DecoderLayer]:
        """The model's own layers, without MTP."""
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def _mixtures(self) -> Iterator[MoE]:
        for layer in (*self._layers(), *self.mtp_layers()):
            if isinstance(layer.mlp, MoE):
                yield layer.mlp

    def _rotary(self, positions_BT: Tensor, dtype: torch.dtype) -> RotaryTable:
        dim, theta, yarn = self.config.qk_rope_head_dim, self.config.rope_theta, self.config.rope_scaling
        if yarn is None:
            return RotaryTable(*rope_table(positions_BT, dim, theta, dtype))
        scales, magnitude = yarn.frequency_scales(dim, theta), yarn.rotary_magnitude
        return RotaryTable(*rope_table(positions_BT, dim, theta, dtype, scales, magnitude))

    def _attend(self, ids_BT: Tensor, document_ids_BT: Tensor | None) -> Attend:
        """Attention over these rows, for every layer."""
        length = ids_BT.shape[1]
        if length > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(f"rows of {length} tokens exceed max_position_embeddings = {limit}")
        if document_ids_BT is None:
            documents, positions_BT = None, torch.arange(length, device=ids_BT.device).unsqueeze(0)
        else:
            documents = find_documents(document_ids_BT)
            positions_BT = documents.positions_BT
        lower = self.model.embed_tokens.dtype is not None  # than FP32, in which angles stay
        rotary = self._rotary(positions_BT, torch.float32 if lower else self.lm_head.weight.dtype)
        return partial(attend_rows, rotary=rotary, documents=documents)

    def _contexts(
        self, context: RoutingContext = DEFAULT_CONTEXT, routes: Sequence[Tensor] | None = None
    ) -> list[RoutingContext]:
        """One routing context per layer. They differ only in the experts that `routes` forces for the layer."""
        layers = [*self._layers(), *self.mtp_layers()]
        if routes is None:
            return [context] * len(layers)
        mixtures = [layer for layer in layers if isinstance(layer.mlp, MoE)]
        given = dict(zip(mixtures, routes, strict=True))
        return [replace(context, forced_ids_TK=given.get(layer)) for layer in layers]

    def _hidden(
        self, ids_BT: Tensor, attend: Attend, contexts: Sequence[RoutingContext]
    ) -> Parts[tuple[Tensor, Tensor, list[Routing]]]:
        """The normalized hidden states after the last layer, the sum of the layers' balance losses, and their
        routings."""
        if self.progress is not None:
            self.progress.begin()
        x_BTD = self.model.embed_tokens(ids_BT)
        balance = x_BTD.new_zeros((), dtype=torch.promote_types(x_BTD.dtype, torch.float32))
        routings: list[Routing] = []
        for number, layer in enumerate(self._layers()):
            self._cross(x_BTD, number)
            x_BTD, routing = yield from training_layer_parts(layer, x_BTD, attend, contexts[number])
            balance = add_balance(balance, routing)
            if routing is not None:
                routings.append(routing)
        self._cross(x_BTD, self.config.num_hidden_layers)
        return self.model.norm(x_BTD), balance, routings

    def _end(self) -> None:
        if self.progress is not None:
            self.progress.end()

    def _cross(self, x_BTD: Tensor, boundary: int) -> None:
        if self.progress is not None:
            self.progress.cross(x_BTD, boundary)


def _last_real(x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
    """Each row's token at its highest position: [B, 1, D]."""
    last_B = positions_BT.argmax(dim=1)
    return x_BTD.gather(1, last_B[:, None, None].expand(-1, 1, x_BTD.shape[-1]))
