"""State of one training rank, and its construction for any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from moray.actors.data.batch_plan import BatchPlan
from moray.kernels.util.deferred import DeferredGradients
from moray.kernels.util.device import runtime
from moray.models.expert_parallel.all_to_all import AllToAll
from moray.models.expert_parallel.deepep import DeepEPDispatcher, elastic_buffer
from moray.models.expert_parallel.dispatcher import LocalDispatcher, ProcessGroupDispatcher
from moray.models.expert_parallel.exchange_check import ExchangeCheck
from moray.models.expert_parallel.shared_memory import connect
from moray.models.expert_parallel.stages import Dispatcher
from moray.models.expert_parallel.two_hop import Nodes
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.checkpoint.archive import Archive
from moray.pipelines.pretrain.checkpoint.checkpoints import Checkpoints
from moray.pipelines.pretrain.checkpoint.training_state import TrainingState
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.initial_state import draw_weights, fill_weights
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.ema import Ema
from moray.pipelines.pretrain.optim.optimizer import ShardedOptimizer, sharded_optimizer
from moray.pipelines.pretrain.resilience.guard import Guard, read_record
from moray.platform.store.paths import any_path


@dataclass
class Worker:
    """One rank's training state."""

    job: TrainingJob
    mesh: Mesh
    device: torch.device
    state: TrainingState
    checkpoints: Checkpoints
    deferred: DeferredGradients | None = None  # weight gradients, computed while the rank waits for communication
    check: ExchangeCheck | None = None  # of what the ranks send each other
    step: int = 0  # the current step
    busy: str = ""  # a long operation outside of steps, such as saving

    @property
    def overlaps(self) -> bool:
        """Whether each of two micro-batches computes while the other communicates."""
        return overlaps(self.job, self.mesh)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Marks this rank as busy within the block, so that it does not count as hung."""
        self.busy = activity
        try:
            yield
        finally:
            self.busy = ""

    @property
    def model(self) -> DeepseekV3:
        return self.state.model

    @property
    def optimizer(self) -> ShardedOptimizer:
        return self.state.optimizer

    @cached_property
    def plan(self) -> BatchPlan:
        return batch_plan(self.job.config, self.job.sequence_length)

    @property
    def total_tokens(self) -> int:
        return self.tokens_before(self.job.config.steps)

    def tokens_before(self, step: int) -> int:
        """Tokens, padding included, of all steps before this one."""
        return self.plan.before(step) * self.job.sequence_length

    def slots(self, step: int) -> tuple[int, int]:
        """This rank's slots [start, stop) of a step's global batch."""
        size, rank, world = self.plan.size(step), self.mesh.rank, self.mesh.world
        return size * rank // world, size * (rank + 1) // world


def overlaps(job: TrainingJob, mesh: Mesh) -> bool:
    """Whether micro-batches overlap. With EP 1 there is no all-to-all to overlap with."""
    return job.config.parallel.overlap and mesh.ep > 1


def build(job: TrainingJob, mesh: Mesh, device: torch.device) -> Worker:
    """`assemble` with the initial weights."""
    worker = assemble(job, mesh, device)
    initialize(worker)
    return worker


def assemble(job: TrainingJob, mesh: Mesh, device: torch.device) -> Worker:
    """The rank's model, optimizer and checkpoints, on `device`. The weights are NaN until `initialize` or a checkpoint
    sets them."""
    config, folder = job.config, any_path(job.folder)
    # Not with DeepSpeed's ZeRO 2, which reduces gradients during the backward.
    hooked = config.optimizer.offload and config.parallel.zero_stage == 2
    deferred = DeferredGradients() if overlaps(job, mesh) and not hooked else None
    dispatcher = _dispatcher(job, mesh, device, deferred)
    model = _model(job, mesh, device, dispatcher, deferred)
    optimizer = sharded_optimizer(model, mesh, config, device, deferred)
    if optimizer.takes_gradients_in_place:
        model.add_gradients_in_place()
    ema = Ema(optimizer, config.ema_half_life_tokens) if config.ema_half_life_tokens else None
    guard = Guard(config.resilience.spikes, mesh.from_first(lambda: read_record(folder)))
    state = TrainingState(model, optimizer, ema, guard)
    archive = None
    if config.checkpoint.archive and isinstance(folder, Path):
        archive = Archive(config.checkpoint.archive, folder.name, folder / "checkpoints", (mesh.rank, mesh.world))
    keep = (config.checkpoint.keep, config.checkpoint.keep_hours)
    checkpoints = Checkpoints(folder / "checkpoints", mesh, *keep, archive)
    check = dispatcher.check if isinstance(dispatcher, ProcessGroupDispatcher) else None
    return Worker(job, mesh, device, state, checkpoints, deferred, check)


def initialize(worker: Worker) -> None:
    """Sets the initial weights: those of `job.initial`, or random ones, which do not depend on the layout."""
    job, state = worker.job, worker.state
    if job.initial is None:
        draw_weights(state.optimizer, job.model.initializer_range, job.config.seed)
    else:
        fill_weights(job.initial, state.model, state.optimizer)
    state.optimizer.refresh_weights()
    if state.ema:
        state.ema.restart()


def _dispatcher(job: TrainingJob, mesh: Mesh, device: torch.device, deferred: DeferredGradients | None) -> Dispatcher:
    config, group, experts = job.config.parallel, mesh.ep_group, job.model.n_routed_experts
    if mesh.ep == 1:
        return LocalDispatcher()
    assert group is not None
    if config.dispatch == "deepep":
        largest = max(batch_plan(job.config, job.sequence_length).sizes)
        sequences = config.micro_batch_sequences or -(-largest // mesh.world)
        buffer = elastic_buffer(group, job.model, sequences * job.sequence_length, job.config.precision == "fp8")
        return DeepEPDispatcher(group, experts, buffer, mesh.clock.over, deferred)
    shares = config.shared_memory and device.type == "cpu"
    if mesh.node_groups is None:
        return ProcessGroupDispatcher(group, experts, mesh.clock.over, deferred, connect(group) if shares else None)
    between, within = mesh.node_groups
    memory = connect(within) if shares else None
    nodes = Nodes(AllToAll(between), AllToAll(within, memory=memory), runtime(device).queue())
    return ProcessGroupDispatcher(group, experts, mesh.clock.over, deferred, nodes=nodes)


def _model(
    job: TrainingJob,
    mesh: Mesh,
    device: torch.device,
    dispatcher: Dispatcher,
    deferred: DeferredGradients | None,
) -> DeepseekV3:
    with torch.device("meta"):  # the optimizer allocates the weights
        model = DeepseekV3(job.model, mesh.experts(job.model.n_routed_experts), dispatcher)
    model.allocate_buffers(device)
    if job.config.precision == "float64":
        model.double()
    model.train()
    parallel = job.config.parallel
    policy = parallel.recompute
    model.set_recompute(policy if isinstance(policy, str) else policy.every, parallel.offload_activations)
    if job.config.precision in ("bf16", "fp8"):
        model.compute_in(torch.bfloat16)
    if job.config.precision == "fp8":
        model.train_in_fp8(parallel.keep_fp8_transposes)
    model.defer_gradients(deferred)
    return model
