"""A model whose forward over the latent cache is PyTorch's: on GPUs, and where the compiled one cannot be built.

Shapes: V vocabulary, W tokens whose logits are wanted, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moray.models.cache import LatentCache
from moray.models.expert_shard import ExpertShard
from moray.models.model import DeepseekV3
from moray.models.rows import RowLogits, Span


class EagerModel:
    """`RowModel` of a model in eval mode, on its device and in its dtype."""

    def __init__(self, model: DeepseekV3) -> None:
        self.config = model.config
        self._model = model
        self._weight = model.lm_head.weight

    @property
    def element_bytes(self) -> int:
        return self._weight.element_size()

    def expert_rows(self) -> Tensor:
        rows_LE = torch.zeros(self.config.num_hidden_layers, self.config.n_routed_experts, dtype=torch.int64)
        shards = (module for module in self._model.modules() if isinstance(module, ExpertShard))
        for layer, shard in zip(self.config.moe_layers, shards, strict=False):  # the shards of MTP come last
            rows_LE[layer] = shard.load_E.cpu()
        return rows_LE

    def cache(self, blocks: int, block_size: int) -> LatentCache:
        return LatentCache(self.config, blocks, block_size, self._weight.dtype, self._weight.device)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span], cache: LatentCache) -> RowLogits:
        """A batch is padded on the left to its longest span, so it has only spans of more than half that length."""
        parts: dict[int, Tensor] = {}
        left = sorted(range(len(spans)), key=lambda number: len(spans[number].ids), reverse=True)
        while left:
            width = len(spans[left[0]].ids)
            numbers = [number for number in left if 2 * len(spans[number].ids) > width]
            left = left[len(numbers) :]
            found = self._padded([spans[number] for number in numbers], cache)
            parts |= dict(zip(numbers, found, strict=True))
        hidden_WD = torch.cat([parts[number] for number in range(len(spans))])
        logits_WV = self._model.lm_head(hidden_WD)
        logits_WV = logits_WV if logits_WV.dtype == torch.float64 else logits_WV.float()
        best = torch.where(logits_WV.isfinite().all(-1), logits_WV.argmax(-1), -1)
        return RowLogits(logits_WV, best.tolist(), hidden_WD)

    def _padded(self, spans: list[Span], cache: LatentCache) -> list[Tensor]:
        width, depth = max(len(span.ids) for span in spans), max(len(span.table) for span in spans)
        ids, positions, tables = [], [], []
        for span in spans:
            padding = width - len(span.ids)
            ids.append([0] * padding + list(span.ids))
            positions.append([-1] * padding + list(range(span.start, span.start + len(span.ids))))
            tables.append(list(span.table) + [-1] * (depth - len(span.table)))
        last_only = max(span.wanted for span in spans) <= 1
        given = [torch.tensor(rows, device=self._weight.device) for rows in (ids, positions, tables)]
        hidden_BTD = self._model.hidden_cached(given[0], given[1], cache, given[2], last_only)
        return [rows[len(rows) - span.wanted :] for rows, span in zip(hidden_BTD, spans, strict=True)]
