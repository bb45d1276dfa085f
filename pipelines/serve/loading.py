"""Loads a model for serving: weights on their device, and a cache of the size that fits beside them."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from moray.models import checkpoint
from moray.pipelines.serve.cache_size import BLOCK_SIZE, cache_bytes
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.scheduler import EngineLimits
from moray.platform.core.serve_options import ServeOptions

_CGROUP = Path("/sys/fs/cgroup")


def load_engine(folder: Path, options: ServeOptions) -> Engine:
    """The engine of the model in `folder`, on the device that `options` name. Raises InputError if it does not fit."""
    torch.set_num_threads(options.threads)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if options.device == "auto" else options.device)
    dtype = _dtype(options, device)
    model = checkpoint.load(folder, dtype, mtp=False)
    vocabulary = ServingVocabulary.load(folder, model.config.bos_token_id, model.config.eos_token_id)
    model = model.to(device)
    memory = cache_bytes(model.config, options, dtype.itemsize, free_bytes(device))
    return Engine(model, vocabulary, EngineLimits(options.step_tokens, options.max_running, memory, BLOCK_SIZE))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU, or on this host within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def _dtype(options: ServeOptions, device: torch.device) -> torch.dtype:
    if options.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
