"""Peak FLOPS of a device, the denominator of MFU."""

from __future__ import annotations

import time

import torch

from moray.kernels.util.device import runtime

# Dense BF16 FLOPS from the data sheets. MFU of FP8 training is relative to BF16 too, as DeepSeek reports it.
_BF16 = {"A100": 312e12, "H100": 989.5e12, "H200": 989.5e12, "H800": 989.5e12, "B200": 2250e12}
_SIZE = 768  # rows and columns of the matrices that measure an unknown device


def peak_flops(device: torch.device) -> float:
    """FLOPS: of a known GPU from its data sheet, else as measured now with an FP32 matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in _BF16.items():
            if known in name:
                return flops
    a = torch.ones(_SIZE, _SIZE, device=device)
    return 2 * _SIZE**3 / min(_seconds(a) for _ in range(5))


def _seconds(a: torch.Tensor) -> float:
    runtime(a.device).synchronize()
    began = time.perf_counter()
    (a @ a)[0, 0].item()
    return time.perf_counter() - began
