"""Initial weights, by logical name: norms are ones, everything else is normal with `initializer_range`.

A tensor is drawn from (seed, its name), so a model starts from the same weights in any layout. It is drawn in FP32 on
the device that needs it: no host holds the model. CPUs and GPUs have different generators, so their numbers differ.
"""

import hashlib

import torch
from torch import Tensor


def initial_value(name: str, numel: int, std: float, seed: int, device: torch.device) -> Tensor:
    """The weight `name`, flat, FP32 [numel]."""
    if name.endswith("norm.weight"):
        return torch.ones(numel, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(numel, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)
