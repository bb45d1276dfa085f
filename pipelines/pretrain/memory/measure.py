"""The memory of one rank in one training step: the real model, optimizer and step on the meta device (`meter.py`), in a
process group of the full size (`launches.py`, `stand_ins.py`).

The first step of a run is measured, with as many micro-batches as change anything, and the copy for a checkpoint after
it. Not included: CUDA's context, NCCL's channels, and the fragmentation of the allocator.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from moray.actors.data.token_set import Batch
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.layout import dense_ranks
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.pipelines.pretrain.memory.launches import metered
from moray.pipelines.pretrain.memory.meter import Answer, HostRead, MemoryMeter, Place
from moray.pipelines.pretrain.memory.row_counts import row_counts
from moray.pipelines.pretrain.memory.stand_ins import unsent_group, unsent_mesh
from moray.pipelines.pretrain.train_step import measure, take
from moray.pipelines.pretrain.worker import assemble

# Where the host reads the rows of experts: between ranks, and of the loop over local experts, in FP32.
_EXCHANGED, _LOOP = "models/expert_parallel/count_exchange.py:wait", ("experts_reference", "experts_deferred")
_SUMS = "pipelines/pretrain/train_step.py:measure"
_NODE_RANKS = 8  # GPUs of a host, if `parallel.node_ranks` does not say
_DEVICE = torch.device("meta")


@dataclass(frozen=True)
class StepMemory:
    """device, host: memory by part. reads: places where the host waits for the device in a step, with their number."""

    device: Place
    host: Place
    reads: dict[HostRead, int]


def step_memory(job: TrainingJob, world: int, imbalance: float = 1.0) -> StepMemory:
    """The memory of rank 0 of `world`. imbalance: rows at its experts over the mean of all ranks."""
    parallel = job.config.parallel
    sequences = -(-max(batch_plan(job.config, job.sequence_length).sizes) // world)
    micro = min(parallel.micro_batch_sequences or sequences, sequences)
    ep = parallel.expert_parallel
    # More micro-batches need no more memory: the first backward's are here, and the last's.
    enough = 4 if parallel.overlap and ep > 1 else 2
    some = {"batch_sequences": world * min(sequences, enough * micro), "batch_ramp": None}
    job = dataclasses.replace(job, config=job.config.model_copy(update=some))
    width = parallel.node_ranks or _NODE_RANKS
    width = width if ep % width == 0 and ep > width else 1
    counts, pairs_L = row_counts(job.model, ep, width, micro * job.sequence_length, imbalance)
    meter = MemoryMeter(_answers(counts, pairs_L))
    with unsent_group(0, world), metered(meter):
        mesh = unsent_mesh(0, world, ep, dense_ranks(world, parallel.shard_ranks), width)
        worker = assemble(job, mesh, _DEVICE)
        worker.optimizer.refresh_weights()
        meter.reads.clear()
        measured = measure(worker, _batch(job, *worker.slots(0)), 0)
        take(worker, 0, measured)
        reads = dict(meter.reads)
        worker.checkpoints.copy_owned(worker.state, 1, 0)
    return StepMemory(meter.device, meter.host, reads)


def _answers(counts: torch.Tensor, pairs_L: torch.Tensor) -> dict[str, Answer]:
    """What the host reads there, both of `row_counts`."""
    loops = {f"kernels/experts.py:{function}": lambda _: pairs_L for function in _LOOP}
    intact = torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.float64)  # the step's sums; the last counts corrupt rows
    return {_EXCHANGED: lambda _: counts, _SUMS: lambda _: intact, **loops}


def _batch(job: TrainingJob, first: int, last: int) -> Batch:
    shape = (last - first, job.sequence_length)
    return Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int32), np.ones(shape, np.bool_))
