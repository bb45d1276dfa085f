"""Loads a model for serving: weights on their device, and a cache of the size that fits beside them."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import torch

from moray.kernels.cached_step import BuildError
from moray.models import checkpoint
from moray.models.compiled import CompiledModel
from moray.models.eager import EagerModel
from moray.models.rows import RowModel
from moray.pipelines.serve.cache_size import BLOCK_SIZE, cache_bytes
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.scheduler import EngineLimits
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.core.serve_options import ServeOptions

_log = logging.getLogger(__name__)
_CGROUP = Path("/sys/fs/cgroup")
_FIX = "install a C compiler, such as gcc, or name one in $CC"


def load_engine(folder: Path, options: ServeOptions) -> Engine:
    """The engine of the model in `folder`, on the device that `options` name. Raises InputError if it does not fit."""
    torch.set_num_threads(options.threads)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if options.device == "auto" else options.device)
    model, notice = _model(folder, options, device)
    vocabulary = ServingVocabulary.load(folder, model.config.bos_token_id, model.config.eos_token_id)
    memory = cache_bytes(model.config, options, model.element_bytes, free_bytes(device))
    limits = EngineLimits(options.step_tokens, options.max_running, memory, BLOCK_SIZE)
    return Engine(model, vocabulary, limits, notice)


def _model(folder: Path, options: ServeOptions, device: torch.device) -> tuple[RowModel, str]:
    """The model, and what to tell whoever serves it."""
    notice = ""
    dtype = _dtype(options, device)
    if device.type == "cpu":
        weights = options.quantize or ("float32" if dtype == torch.float32 else "bfloat16")
        try:
            native = Home.from_environment().cache / "native"
            return CompiledModel.from_folder(folder, native, weights, options.threads), notice
        except BuildError as error:
            if options.quantize:
                raise InputError(f"--quantize {options.quantize} needs the compiled step: {error}", _FIX) from error
            notice = f"serving by PyTorch, which is some ten times slower: {error} ({_FIX})"
            _log.warning(notice)
    elif options.quantize:
        raise InputError(f"--quantize {options.quantize} is for CPUs only", "leave it out, or use --device cpu")
    return EagerModel(checkpoint.load(folder, dtype, mtp=False).to(device)), notice


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
