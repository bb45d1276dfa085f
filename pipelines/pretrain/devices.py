"""Where training runs: on GPUs, one for each worker, or on CPUs. Pure Python, so that a plan can say it.

GPUs are used where there are any, or refused by name: a run never falls back to CPUs without being told to
(`device: cpu`).
"""

from __future__ import annotations

import math

from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError


def resolved(config: PretrainConfig, topology: Topology) -> PretrainConfig:
    """`config` with `device` "cpu" or "gpu", and with `workers` and `expert_parallel` that fit it where they were not
    given: a worker for each GPU. Raises InputError where the cluster has too few GPUs."""
    if config.device == "cpu" or (config.device == "auto" and not topology.gpus):
        return config.model_copy(update={"device": "cpu"})
    if not topology.gpus:
        raise InputError(
            "pretrain.device: gpu, but the cluster has no GPU", "set pretrain.device to cpu, or leave it out"
        )
    if "workers" not in config.model_fields_set and topology.gpus >= (config.min_workers or 1):
        return config.model_copy(update={"device": "gpu", **_layout(config, topology.gpus)})
    field = "min_workers" if config.min_workers else "workers"
    if topology.gpus < (least := config.min_workers or config.workers):
        raise InputError(
            f"pretrain.{field}: {least} workers need a GPU each, and the cluster has {_gpus(topology.gpus)}",
            f"set pretrain.{field} to {topology.gpus} or less, or pretrain.device to cpu",
        )
    return config.model_copy(update={"device": "gpu"})


def _layout(config: PretrainConfig, gpus: int) -> dict[str, int]:
    """The most workers, up to one for each GPU, that divide all batches; and what `expert_parallel` fits them."""
    given = "expert_parallel" in config.model_fields_set
    step = config.expert_parallel if given else 1
    sizes = batch_plan(config, sequence_length=1).sizes
    fitting = (n for n in range(gpus - gpus % step, 0, -step) if not any(size % n for size in sizes))
    workers = next(fitting, 0)
    if not workers and gpus >= step:
        raise InputError(
            f"pretrain.batch_sequences: batches of {' and '.join(map(str, sorted(set(sizes))))} sequences cannot be "
            f"divided among {step} ranks",
            f"make them multiples of {step}, or set pretrain.expert_parallel to a number that divides them",
        )
    if not workers:
        raise InputError(
            f"pretrain.expert_parallel: {step} ranks need a GPU each, and the cluster has {_gpus(gpus)}",
            f"set pretrain.expert_parallel to {gpus} or less, or pretrain.device to cpu",
        )
    return {"workers": workers, "expert_parallel": step if given else math.gcd(workers, config.expert_parallel)}


def device_words(config: PretrainConfig) -> str:
    """Of a resolved config: "2 workers on CPUs", "8 workers with a GPU each"."""
    least = f"{config.min_workers} to " if config.min_workers else ""
    many = "worker" if config.workers == 1 else "workers"
    where = "on CPUs" if config.device == "cpu" else "on a GPU" if config.workers == 1 else "with a GPU each"
    return f"{least}{config.workers} {many} {where}"


def cpu_share(config: PretrainConfig, cpus: int) -> float:
    """CPUs to ask for each worker: one, or where cores are few an equal share, so that all of them can be placed.

    Rounded down to Ray's unit of a ten-thousandth: rounded up, the last worker would find no room.
    """
    return 1.0 if cpus >= config.workers else math.floor(cpus * 10_000 / config.workers) / 10_000


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
