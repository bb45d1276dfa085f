"""Which layouts of workers can be. Pure Python, so that a recipe is checked without torch."""

from __future__ import annotations


def check_layout(world: int, ep: int, experts: int | None = None, batch_sequences: int | None = None) -> None:
    """Raises ValueError if the layout cannot be: EP must divide the world and the experts, the world the batch."""
    if world % ep:
        raise ValueError(f"workers ({world}) must be a multiple of expert_parallel ({ep})")
    if experts is not None and experts % ep:
        raise ValueError(f"n_routed_experts ({experts}) must be a multiple of expert_parallel ({ep})")
    if batch_sequences is not None and batch_sequences % world:
        raise ValueError(f"batch_sequences ({batch_sequences}) must be a multiple of workers ({world})")
