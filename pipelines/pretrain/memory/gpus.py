"""Memory of GPUs."""

from __future__ import annotations

from collections.abc import Mapping

from moray.platform.core.errors import InputError, nearest

_MIB = 1 << 20
# MiB that nvidia-smi shows as the total.
GPUS = {
    "a100-40gb": 40_960,
    "a100-80gb": 81_920,
    "h100-80gb": 81_559,
    "h800-80gb": 81_559,
    "h20-96gb": 97_871,
    "h200-141gb": 143_771,
    "b200-180gb": 183_359,
    "l40s-48gb": 46_068,
    "rtx4090-24gb": 24_564,
}
# Ray's names of accelerator types, of which only some say the size.
_RAY = {
    "A100-40G": "a100-40gb",
    "A100-80G": "a100-80gb",
    "H100": "h100-80gb",
    "H800": "h800-80gb",
    "H20": "h20-96gb",
    "H200": "h200-141gb",
    "B200": "b200-180gb",
    "L40S": "l40s-48gb",
}
# Not for tensors: CUDA's context and modules, NCCL's channels, and gaps between the allocator's blocks.
RESERVE = 0.08


def usable_bytes(gpu: str) -> int:
    """Bytes of a GPU for tensors. Raises InputError for an unknown name."""
    if gpu not in GPUS:
        raise InputError(f"unknown GPU {gpu!r}", nearest(gpu, GPUS))
    return int(GPUS[gpu] * _MIB * (1 - RESERVE))


def gpu_of(resources: Mapping[str, float]) -> str | None:
    """The smallest GPU among a Ray cluster's resources, if its size is known."""
    kinds = {name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")}
    known = [_RAY[kind] for kind in kinds if kind in _RAY]
    return min(known, key=GPUS.__getitem__, default=None)
