"""The devices of a training run: one GPU per worker, or CPUs. Pure Python, so that `moray plan` can show them.

If the cluster has GPUs, training uses them; if it has too few, that is an error. A run uses CPUs beside GPUs only if
the recipe sets `device: cpu`.
"""

from __future__ import annotations

import math

from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError


def resolved(config: PretrainConfig, topology: Topology) -> PretrainConfig:
    """`config` with `parallel.device` set to "cpu" or "gpu". If `workers` is not given, it becomes one per GPU, and
    `expert_parallel` is reduced to fit unless it is given. Raises InputError if the cluster has too few GPUs."""
    parallel, least = config.parallel, config.resilience.min_workers
    if parallel.device == "cpu" or (parallel.device == "auto" and not topology.gpus):
        return config.with_parallel(device="cpu")
    if not topology.gpus:
        raise InputError(
            "pretrain.parallel.device: gpu requires a GPU, and the cluster has none",
            "set pretrain.parallel.device to cpu or auto",
        )
    if "workers" not in parallel.model_fields_set and topology.gpus >= (least or 1):
        return config.with_parallel(device="gpu", **_layout(config, topology.gpus))
    field = "resilience.min_workers" if least else "parallel.workers"
    if topology.gpus < (needed := least or parallel.workers):
        raise InputError(
            f"pretrain.{field}: {needed} workers require a GPU each, and the cluster has {_gpus(topology.gpus)}",
            f"set pretrain.{field} to {topology.gpus} or less, or pretrain.parallel.device to cpu",
        )
    return config.with_parallel(device="gpu")


def _layout(config: PretrainConfig, gpus: int) -> dict[str, int]:
    """One worker per GPU, or per sequence of the largest batch if these are fewer; in whole groups of
    `expert_parallel`, which is reduced to a divisor unless it is given."""
    wanted, given = config.parallel.expert_parallel, "expert_parallel" in config.parallel.model_fields_set
    step = wanted if given else 1
    if gpus < step:
        raise InputError(
            f"pretrain.parallel.expert_parallel: {step} ranks require a GPU each, and the cluster has {_gpus(gpus)}",
            f"set pretrain.parallel.expert_parallel to {gpus} or less, or pretrain.parallel.device to cpu",
        )
    most = min(gpus, max(step, *batch_plan(config, sequence_length=1).sizes))
    workers = most - most % step
    return {"workers": workers, "expert_parallel": step if given else math.gcd(workers, wanted)}


def device_text(config: PretrainConfig) -> str:
    """The devices of a resolved config, such as "2 workers on CPUs" or "8 workers with a GPU each"."""
    workers, least = config.parallel.workers, config.resilience.min_workers
    noun = "worker" if workers == 1 else "workers"
    device = "on CPUs" if config.parallel.device == "cpu" else "on a GPU" if workers == 1 else "with a GPU each"
    return f"{f'{least} to ' if least else ''}{workers} {noun} {device}"


def cpu_share(workers: int, cpus: int) -> float:
    """CPUs to request from Ray per worker: one, or an equal share if there are fewer CPUs than workers.

    Rounded down to Ray's unit of 1/10,000, because Ray could not place the last worker if the shares were rounded up.
    """
    return 1.0 if cpus >= workers else math.floor(cpus * 10_000 / workers) / 10_000


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
