"""Routing by choices that were made before: what each router would choose now, and how to have it do what was chosen.

DeepSeek-V4's anticipatory routing (arXiv 2606.19348, 4.2.3) takes the choices of slightly older weights. The factors of
the experts' outputs are the present weights', and so are gradients.

Shapes: B batch, T tokens, K slots.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from moray.models.expert_parallel.interleave import Parts
from moray.models.model import DeepseekV3

T = TypeVar("T")


@torch.no_grad()
def choose_experts(
    model: DeepseekV3,
    ids_BT: Tensor,
    targets_BT: Tensor,
    document_ids_BT: Tensor | None = None,
    rows_R: Tensor | None = None,
) -> list[Tensor]:
    """The experts that every router chooses for these tokens, int64 [B * T, K] each; 0 at padding, where `rows_R` tells
    of some. Nothing is counted."""
    routers = model.routers()
    for router in routers:
        router.chosen_TK = torch.empty(0)
    try:
        model.training_loss(ids_BT, targets_BT, document_ids_BT, rows_R=rows_R)
        return [router.chosen_TK for router in routers if router.chosen_TK is not None]
    finally:
        for router in routers:
            router.chosen_TK = None


def routed_parts(model: DeepseekV3, experts: Sequence[Tensor], parts: Parts[T]) -> Parts[T]:
    """Parts of a forward, each routed as in `routed_as`; others may come between them."""
    while True:
        with routed_as(model, experts):
            try:
                next(parts)
            except StopIteration as end:
                value: T = end.value
                return value
        yield


@contextmanager
def routed_as(model: DeepseekV3, experts: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, routers send tokens to these experts: what `choose_experts` gave for the same tokens."""
    routers = model.routers()
    for router, given_TK in zip(routers, experts, strict=True):
        router.given_TK = given_TK
    try:
        yield
    finally:
        for router in routers:
            router.given_TK = None
