"""Tile shapes for GEMMs, by device, kernel and size, and the precision of weight gradients, by device.

`benchmarks/tune_gpu.py` measures the candidates on the available GPU and writes `tuned/DEVICE.json`, which is
committed. A device without a table gets the defaults. Nothing is tuned at run time, so a training job's first step is
as fast as its second, and two runs compute in the same order.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_TABLES = Path(__file__).with_name("tuned")


@dataclass(frozen=True)
class Tiles:
    """rows x columns of a CTA's output tile, its warps, and the stages of its pipeline."""

    rows: int = 128
    columns: int = 128
    warps: int = 8
    stages: int = 4

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


DEFAULT = Tiles()


def table_file(device_name: str) -> Path:
    """Path of a device's table."""
    return _TABLES / f"{device_name.replace(' ', '-').replace('/', '-')}.json"


@functools.cache
def _table(device_name: str) -> dict[str, Any]:
    path = table_file(device_name)
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return table


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def nearest_shape(device_name: str, kernel: str, m: int, n: int, k: int) -> Tiles:
    """The tiles measured for the size nearest to m x n x k, by the ratios of the three dimensions."""

    def distance(row: dict[str, int]) -> float:
        return sum(abs((want / max(row[name], 1)) ** 0.5 - 1) for name, want in (("m", m), ("n", n), ("k", k)))

    rows = _table(device_name).get("kernels", {}).get(kernel)
    if not rows:
        return DEFAULT
    best = min(rows, key=distance)
    return Tiles(best["rows"], best["columns"], best["warps"], best["stages"])


def tiles(kernel: str, device: torch.device, m: int, n: int, k: int) -> Tiles:
    """The tile shape for a GEMM of this size on this device."""
    return nearest_shape(_device_name(device), kernel, m, n, k)


def weight_gradients_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies the factors of experts' weight gradients faster in BF16, with the time to dequantize
    them, than in FP8, with the time to transpose them."""
    measured = _table(_device_name(device)).get("weight_gradient_ms")
    return measured is not None and measured["bf16"] < measured["fp8"]
