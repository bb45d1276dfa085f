"""A model with the weights that the compiled step computes with: the oracle of its BF16 and INT8 forms."""

from __future__ import annotations

import torch
from torch import Tensor

from moray.models.model import DeepseekV3


@torch.no_grad()
def round_weights(model: DeepseekV3, form: str) -> DeepseekV3:
    """Rounds the matrices of a model in place, and returns it. form: `float32` changes nothing.

    In INT8, embeddings are BF16, and the two halves of kv_b_proj have scales of their own outputs, because the step
    multiplies queries with the transposed key half.
    """
    heads, nope = model.config.num_attention_heads, model.config.qk_nope_head_dim
    for name, view, _ in model.logical_parameters():
        router = name.endswith("mlp.gate.weight")
        if form == "float32" or view.dim() == 1 or (router and form == "bfloat16"):
            continue
        if form == "bfloat16" or "embed" in name:
            view.copy_(view.bfloat16().float())
        elif "kv_b_proj" in name:
            keys, values = view.unflatten(0, (heads, -1)).split([nope, model.config.v_head_dim], dim=1)
            keys.copy_(_int8(keys.transpose(1, 2)).transpose(1, 2))
            values.copy_(_int8(values))
        else:
            view.copy_(_int8(view))
    return model


def _int8(weight: Tensor) -> Tensor:
    """Rounded to INT8 with a scale for each output."""
    scales = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scales).round() * scales
