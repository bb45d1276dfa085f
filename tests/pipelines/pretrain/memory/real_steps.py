"""A training step of a toy, measured: with data by torch's profiler, and without by the planner. Jobs of the rank pool.

Both take the code path of a GPU: in the real step, Triton's interpreter runs the kernels on CPU tensors.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from triton.runtime.interpreter import GridExecutor

from moray.actors.data.token_set import Batch
from moray.kernels.util.deferred import DeferredGradients
from moray.kernels.util.device import HostRuntime
from moray.models.presets import preset
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.layout import dense_ranks
from moray.pipelines.pretrain.memory.launches import _Queue
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim import unit
from moray.pipelines.pretrain.train_step import measure, take
from moray.pipelines.pretrain.worker import Worker, build
from tests.pipelines.pretrain.settings import pretrain_config

LENGTH = 16
MODEL = dataclasses.replace(
    preset("tiny"), vocab_size=128, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=2, max_position_embeddings=LENGTH, num_nextn_predict_layers=1,
)  # fmt: skip


@dataclass(frozen=True)
class RealStep:
    """peak: bytes that torch's allocator held at most, from before the model was built until after the step. imbalance:
    rows at this rank's experts over the mean of all ranks."""

    peak: int
    imbalance: float


def job_of(settings: dict[str, Any]) -> TrainingJob:
    world = settings.get("workers", 1)
    fields = {"steps": 20, "batch_sequences": 4 * world, "micro_batch_sequences": 1, "document_mask": False}
    fields |= {"shared_memory": False, "workers": 1, "expert_parallel": 1}
    return TrainingJob(pretrain_config(**fields | settings), MODEL, LENGTH, "/nonexistent/run", "", "pretrain", 1)


def real_step(settings: dict[str, Any]) -> RealStep:
    job, cpu = job_of(settings), torch.device("cpu")
    with gpu_code(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        parallel = job.config.parallel
        dense = dense_ranks(dist.get_world_size(), parallel.shard_ranks)
        worker = build(job, Mesh.create(parallel.expert_parallel, cpu, dense, parallel.node_ranks), cpu)
        take(worker, 0, measure(worker, random_batch(worker), 0))
    loads = torch.stack([shard.load_E.sum() for shard in worker.model.shards()]).double()
    mean = loads.clone()
    dist.all_reduce(mean)
    return RealStep(allocated(profiled), float((loads * dist.get_world_size() / mean).mean()))


def random_batch(worker: Worker) -> Batch:
    begin, end = worker.slots(0)
    generator = np.random.default_rng(begin)
    shape = (end - begin, LENGTH)
    ids = generator.integers(0, MODEL.vocab_size, shape)
    return Batch(ids, np.zeros(shape, np.int32), np.ones(shape, np.bool_))


def allocated(profiled: Any) -> int:
    """The largest sum of the allocator's records."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max())


@contextmanager
def gpu_code() -> Iterator[None]:
    """Kernels are Triton's; a wait for a transfer computes all deferred gradients, as a GPU's host does, which runs
    ahead; a queue's work is issued at once; and sharded weights are exchanged without copies, which gloo makes and NCCL
    does not."""
    environment, fill, queue = dict(os.environ), DeferredGradients.fill, HostRuntime.queue
    exchanges = unit._all_gather, unit._reduce_scatter
    os.environ["MORAY_KERNELS"] = "triton"

    def fill_all(self: DeferredGradients, done: Callable[[], bool]) -> None:
        fill(self, done if done.__name__ == "<lambda>" else lambda: False)

    DeferredGradients.fill = fill_all  # type: ignore[method-assign]
    HostRuntime.queue = lambda _: _Queue()  # type: ignore[method-assign]
    if dist.is_initialized():
        unit._all_gather, unit._reduce_scatter = gathered, reduced_and_scattered
    try:
        with collected_launches():
            yield
    finally:
        DeferredGradients.fill = fill  # type: ignore[method-assign]
        HostRuntime.queue = queue  # type: ignore[method-assign]
        unit._all_gather, unit._reduce_scatter = exchanges
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def collected_launches() -> Iterator[None]:
    """A kernel's interpreter leaves cycles of objects that hold its tensors. They are collected at once: a GPU has
    none."""
    launch = GridExecutor.__call__

    def launch_and_collect(self: Any, *arguments: Any, **options: Any) -> None:
        launch(self, *arguments, **options)
        gc.collect(0)

    gc.collect()
    gc.disable()
    GridExecutor.__call__ = launch_and_collect
    try:
        yield
    finally:
        GridExecutor.__call__ = launch
        gc.enable()


class Done:
    """A transfer that has ended."""

    def wait(self) -> None:
        pass


def gathered(out: torch.Tensor, part: torch.Tensor, group: Any, async_op: bool = False) -> Done:
    for index, (source, view) in enumerate(zip(_members(group), out.chunk(dist.get_world_size(group)), strict=True)):
        if index == dist.get_rank(group):
            view.copy_(part)
        dist.broadcast(view, source, group=group)
    return Done()


def reduced_and_scattered(part: torch.Tensor, whole: torch.Tensor, group: Any, async_op: bool = False) -> Done:
    for index, (target, view) in enumerate(zip(_members(group), whole.chunk(dist.get_world_size(group)), strict=True)):
        dist.reduce(view, target, group=group)
        if index == dist.get_rank(group):
            part.copy_(view)
    return Done()


def _members(group: Any) -> list[int]:
    ranks: list[int] = dist.get_process_group_ranks(group)
    return ranks
