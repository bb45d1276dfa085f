"""Which layouts of workers and which optimizers can be. Pure Python, so that a recipe is checked without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moray.models.config import ModelConfig

BLOCK = 128  # numbers that share a scale in a moment in FP8
# The largest beta2 at which second moments in FP8 are typically within 10 % (`benchmarks/fp8_moments.py`).
MOST_BETA2 = 0.97


def check_blocks(config: ModelConfig) -> None:
    """Raises ValueError if moments in FP8 cannot be: an expert's matrix must be made of whole blocks."""
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    if config.moe_layers and inner * hidden % BLOCK:
        raise ValueError(
            f"moments: fp8 wants hidden_size x moe_intermediate_size ({hidden} x {inner}) to be a multiple of {BLOCK}"
        )


def check_moments(moments: str, beta2: float) -> None:
    """Raises ValueError for a beta2 with which second moments in FP8 would not follow the gradients."""
    if moments == "fp8" and beta2 > MOST_BETA2:
        raise ValueError(
            f"moments: fp8 wants beta2 of at most {MOST_BETA2}, not {beta2}: small changes are lost in FP8's rounding "
            "(at 0.99, where gradients become a quarter, second moments stay 3.3 times too large, one in a hundred 11 "
            "times); lower beta2, DeepSeek-V3 has 0.95, or leave moments at float32"
        )


def check_backend(zero_stage: int, offload: bool, precision: str, moments: str) -> None:
    """Raises ValueError for an optimizer that cannot be."""
    if offload and not zero_stage:
        raise ValueError("offload: true wants zero_stage 1 or 2; at 0 masters are the weights themselves")
    if precision == "float64" and (zero_stage or moments == "fp8"):
        raise ValueError("precision: float64 wants zero_stage 0 and moments: float32; ZeRO's masters are float32")


def check_dispatch(dispatch: str, precision: str, hidden: int) -> None:
    """Raises ValueError for rows that DeepEP does not carry."""
    if dispatch != "deepep":
        return
    if precision not in ("bf16", "fp8"):
        raise ValueError(f"dispatch: deepep wants precision bf16 or fp8, not {precision}: it carries no other rows")
    if hidden % 16:
        raise ValueError(
            f"dispatch: deepep wants hidden_size ({hidden}) to be a multiple of 16: it copies 16 bytes at a time"
        )


def usable_layout(world: int, ep: int, batches: Sequence[int]) -> tuple[int, int]:
    """(ranks, EP) to train with where there are `world` ranks and `ep` was wished for.

    As many ranks as divide all batches, the others having nothing to do; the largest EP that divides them and `ep`.
    """
    size = next(size for size in range(world, 0, -1) if all(batch % size == 0 for batch in batches))
    return size, math.gcd(size, ep)


def check_layout(world: int, ep: int, experts: int | None = None, batches: Sequence[int] = ()) -> None:
    """Raises ValueError if the layout cannot be: EP must divide the world and the experts, the world all batches."""
    if world % ep:
        raise ValueError(f"workers ({world}) must be a multiple of expert_parallel ({ep})")
    if experts is not None and experts % ep:
        raise ValueError(f"n_routed_experts ({experts}) must be a multiple of expert_parallel ({ep})")
    for size in batches:
        if size % world:
            raise ValueError(f"batch_sequences ({size}) must be a multiple of workers ({world})")
