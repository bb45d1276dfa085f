"""Helpers to compare the results of two implementations of a kernel."""

import torch


def same_bits(found, expected):
    """Equal shape, dtype and bits, except that any NaN equals any NaN."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    assert torch.equal(found.view(width)[~nan], expected.view(width)[~nan])


def draw(shape, exponent=0, dtype=torch.float32, seed=0):
    """Normal numbers times 2^exponent."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2.0**exponent).to(dtype)
