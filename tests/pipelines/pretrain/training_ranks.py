"""Jobs of the rank pool: training a toy model in some layout."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

from moray.actors.data.held_out import HeldOutPlan
from moray.actors.data.token_set import Batch
from moray.models.anticipation import choose_experts
from moray.models.expert_parallel.all_to_all import _PendingCollective
from moray.models.expert_parallel.exchange_check import CorruptExchange
from moray.models.moe import MoE
from moray.models.presets import preset
from moray.pipelines.pretrain.checkpoint import checkpoints
from moray.pipelines.pretrain.checkpoint.checkpoint_index import merge_listings
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.held_out_loss import HeldOutLoss, held_out_loss
from moray.pipelines.pretrain.layout import dense_ranks
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim import reduction
from moray.pipelines.pretrain.optim.partitioned import PartitionedOptimizer
from moray.pipelines.pretrain.resilience.collectives import Collective, CollectiveTrace
from moray.pipelines.pretrain.train_step import drop, measure, micro_batches, train_step
from moray.pipelines.pretrain.worker import Worker, build
from tests.pipelines.pretrain.settings import pretrain_config

Arrays = dict[str, npt.NDArray[Any]]
reduction._MIN_ELEMENTS = 1  # else all of a toy's gradients would be reduced after the backward

SEQUENCES, LENGTH, VOCABULARY = 8, 16, 64
# Matrices of experts are whole blocks of 128; dense ones are not, and the vectors are short.
MODEL = dataclasses.replace(
    preset("tiny"),
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=36,
    moe_intermediate_size=20,
    num_hidden_layers=3,
    n_routed_experts=8,
    num_nextn_predict_layers=1,
    q_lora_rank=12,
    kv_lora_rank=9,
    initializer_range=0.1,
    max_position_embeddings=LENGTH,
)


@dataclass
class Trace:
    """A rank's results of some steps: metrics, gradients after each reduction, and the state at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Arrays] = field(default_factory=list)
    biases: Arrays = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)


def logical(states: list[Arrays]) -> Arrays:
    """`kind/name` -> the whole tensor, from all ranks' fragments. Ranks that hold the same elements must agree."""
    parts: dict[str, Arrays] = {}
    for state in states:
        for key, part in state.items():
            name, _, offset = key.rpartition("@")
            known = parts.setdefault(name, {}).setdefault(offset, part)
            np.testing.assert_array_equal(known, part, err_msg=key)
    return {name: np.concatenate([at[offset] for offset in sorted(at, key=int)]) for name, at in parts.items()}


def toy_worker(folder: str, experts: int = MODEL.n_routed_experts, **settings: Any) -> Worker:
    """This rank's worker. The process group must exist."""
    fields = {
        "steps": 20,
        "batch_sequences": SEQUENCES,
        "workers": dist.get_world_size(),
        "expert_parallel": 1,
        "clip": 0.5,
        "ema_half_life_tokens": 2 * SEQUENCES * LENGTH,
        "schedule": {"peak": 1e-2, "bias_speed": 1e-2},
    }
    config = pretrain_config(**fields | settings)
    model = dataclasses.replace(MODEL, n_routed_experts=experts)
    job = TrainingJob(config, model, LENGTH, folder, "", "pretrain", threads=1)
    device = torch.device("cpu")
    parallel = config.parallel
    dense = dense_ranks(dist.get_world_size(), parallel.shard_ranks)
    return build(job, Mesh.create(parallel.expert_parallel, device, dense, parallel.node_ranks), device)


def global_batch(step: int) -> Batch:
    """Numbers that go up by three, documents of several lengths, and padding that is not the same for all ranks."""
    generator = np.random.default_rng(step)
    ids = (generator.integers(0, VOCABULARY, (SEQUENCES, 1)) + 3 * np.arange(LENGTH)) % VOCABULARY
    documents = np.cumsum(generator.random((SEQUENCES, LENGTH)) < 0.15, axis=1, dtype=np.int32)
    mask = np.arange(LENGTH) < np.arange(LENGTH, LENGTH - SEQUENCES, -1)[:, None]
    return Batch(ids, documents, mask)


def steps(worker: Worker, first: int, last: int) -> Iterator[dict[str, float]]:
    """Trains steps [first, last)."""
    for step in range(first, last):
        yield train_step(worker, part_of(worker, step), step)[0]


def part_of(worker: Worker, step: int) -> Batch:
    """This rank's part of a step's global batch."""
    whole = global_batch(step)
    begin, end = worker.slots(step)
    return Batch(whole.ids[begin:end], whole.documents[begin:end], whole.mask[begin:end])


def held(worker: Worker) -> Arrays:
    """Live state by `kind/name@offset`, copied."""
    return {f"{f.kind}/{f.name}@{f.offset}": f.tensor.numpy().copy() for f in worker.state.fragments()}


def sourced_batch(step: int) -> Batch:
    """`global_batch` of two sources that take turns."""
    whole = global_batch(step)
    return dataclasses.replace(whole, sources=(np.arange(SEQUENCES) % 2).astype(np.int32))


def with_sources(whole: Batch, start: int, stop: int) -> Batch:
    """Sequences [start, stop)."""
    assert whole.sources is not None
    part = slice(start, stop)
    return Batch(whole.ids[part], whole.documents[part], whole.mask[part], whole.sources[part])


def held_out_while_training(settings: dict[str, Any]) -> tuple[list[HeldOutLoss], list[float]]:
    """The held-out loss after each of three steps, and the losses of training."""
    worker = toy_worker("unused", **settings)
    plan = HeldOutPlan.of("unused", {"even": 4, "odd": 3}, most=4)
    whole = sourced_batch(1000)
    order = [*range(0, 8, 2), *range(1, 7, 2)]  # the slots: of the first source, then of the second

    def read(start: int, stop: int) -> Batch:
        chosen = order[start:stop]
        return Batch(whole.ids[chosen], whole.documents[chosen], whole.mask[chosen], whole.sources[chosen])

    found, losses = [], []
    for metrics in steps(worker, 0, 3):
        losses.append(metrics["train_loss"])
        found.append(held_out_loss(worker, plan, read))
    return found, losses


def train(count: int, settings: dict[str, Any]) -> Trace:
    """Trains the toy model."""
    worker = toy_worker("unused", **settings)
    trace = Trace()
    reduce = worker.optimizer.reduce

    def record(tokens: torch.Tensor) -> None:
        reduce(tokens)
        trace.gradients.append(
            {
                name: owner.grad.as_strided(view.shape, view.stride(), view.storage_offset()).numpy().copy()
                for name, view, owner in worker.model.logical_parameters()
                if owner.grad is not None
            }
        )

    if not settings.get("zero_stage"):
        worker.optimizer.reduce = record  # type: ignore[method-assign]
    for metrics in steps(worker, 0, count):
        trace.losses.append(metrics["train_loss"])
        trace.norms.append(metrics["train_grad_norm"])
    trace.biases = {name: bias_E.numpy().copy() for name, bias_E in worker.model.logical_biases()}
    trace.state = held(worker)
    return trace


def step_by(kernels: str, settings: dict[str, Any]) -> tuple[float, float]:
    """Loss and gradient norm of the toy model with one backend of the kernels: "reference" or "triton"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORAY_KERNELS", kernels)
        worker = toy_worker("unused", **settings)
        (metrics,) = steps(worker, 0, 1)
        return metrics["train_loss"], metrics["train_grad_norm"]


def train_one_expert(count: int, settings: dict[str, Any]) -> Trace:
    """`train` with biases that send every token to the first expert of the first group, and to another."""
    worker = toy_worker("unused", **settings)
    for router in worker.model.routers():
        router.e_score_correction_bias[0] = 100.0
    trace = Trace()
    for metrics in steps(worker, 0, count):
        trace.losses.append(metrics["train_loss"])
        trace.norms.append(metrics["train_grad_norm"])
    trace.state = held(worker)
    return trace


def failing_step(settings: dict[str, Any]) -> tuple[str, bool]:
    """What a step says whose gradient is infinite on one rank, and whether all weights are as they were."""
    worker = toy_worker("unused", **settings)
    before = held(worker)
    if dist.get_rank() == 1:
        norm = worker.model.model.norm
        norm.register_full_backward_hook(lambda module, grads, _: (grads[0] * float("inf"), *grads[1:]))
    try:
        list(steps(worker, 0, 1))
    except FloatingPointError as error:
        after = held(worker)
        return str(error), all(np.array_equal(before[key], after[key]) for key in before)
    return "", False


def corrupted_step(layer: int, settings: dict[str, Any]) -> tuple[str, bool]:
    """What a step says if rank 1 receives the tokens of one layer shifted by a byte, and whether all weights are as
    they were."""
    worker = toy_worker("unused", **settings)
    before = held(worker)
    wait, now = _PendingCollective.wait, [-1]
    dispatch = MoE.dispatch

    def entered(moe: MoE, *arguments: Any) -> Any:
        now[0] = moe.index
        return dispatch(moe, *arguments)

    def shifted(pending: _PendingCollective) -> torch.Tensor:
        rows = wait(pending)
        if rows.dtype == torch.uint8 and now[0] == layer and dist.get_rank() == 1:
            rows.view(-1)[1:] = rows.flatten()[:-1].clone()
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoE, "dispatch", entered)
        patch.setattr(_PendingCollective, "wait", shifted)
        try:
            list(steps(worker, 0, 1))
        except CorruptExchange as error:
            after = held(worker)
            return str(error), all(np.array_equal(before[key], after[key]) for key in before)
    return "", False


def skipping(settings: dict[str, Any]) -> bool:
    """Whether a dropped batch, routed by given choices, has no effect on the next step."""
    disturbed, other = (toy_worker("unused", **settings) for _ in range(2))
    batch = part_of(disturbed, 0)
    routes = [
        choose_experts(disturbed.model, part.ids, part.targets, part.documents)
        for part in micro_batches(disturbed, batch, 0)
    ]
    assert measure(disturbed, batch, 0, routes) == measure(other, batch, 0)
    drop(disturbed)
    drop(other)
    clean = toy_worker("unused", **settings)
    for worker in (disturbed, clean):
        list(steps(worker, 1, 2))
    after, expected = held(disturbed), held(clean)
    return all(np.array_equal(after[key], expected[key]) for key in expected)


def refused(settings: dict[str, Any]) -> str:
    """The ValueError of invalid settings."""
    try:
        toy_worker("unused", **settings)
    except ValueError as error:
        return str(error)
    return ""


def save_after(folder: str, count: int, settings: dict[str, Any]) -> Trace:
    """Trains `count` steps, saves, trains three more. `state` and `biases` are the saved ones."""
    worker = toy_worker(folder, **settings)
    trace = Trace()
    list(steps(worker, 0, count))
    trace.state = held(worker)
    trace.biases = {name: bias_E.numpy().copy() for name, bias_E in worker.model.logical_biases()}
    worker.checkpoints.save(worker.state, count, worker.tokens_before(count))
    trace.losses = [metrics["train_loss"] for metrics in steps(worker, count, count + 3)]
    worker.checkpoints.wait()
    assert [saved.error for saved in worker.checkpoints.ended()] == [""]
    return trace


@dataclass
class Read:
    """The loaded state; `weights` are the model's, not the optimizer's."""

    position: tuple[int, int]
    state: Arrays
    biases: Arrays
    weights: Arrays


def restore(folders: list[str], settings: dict[str, Any]) -> list[Read]:
    """Loads the newest checkpoint of each folder in turn."""
    found = []
    for folder in folders:
        worker = toy_worker(folder, **settings)
        restored = worker.checkpoints.restore(worker.state)
        position = (restored.steps, restored.tokens)
        if isinstance(worker.optimizer, PartitionedOptimizer):
            for unit in worker.optimizer.units:
                unit.gather()
                unit.wait()
        weights = {name: view.numpy().copy() for name, view, _ in worker.model.logical_parameters()}
        biases = {name: bias_E.numpy().copy() for name, bias_E in worker.model.logical_biases()}
        found.append(Read(position, held(worker), biases, weights))
    return found


def resume(folder: str, count: int, settings: dict[str, Any]) -> list[float]:
    """The losses of three steps after the newest checkpoint, which is at `count` steps."""
    worker = toy_worker(folder, **settings)
    assert worker.checkpoints.restore(worker.state).steps == count
    return [metrics["train_loss"] for metrics in steps(worker, count, count + 3)]


def collectives(settings: dict[str, Any]) -> list[Collective]:
    """The collectives that this rank issues in two steps and a save."""
    worker = toy_worker(settings.pop("folder"), **settings)
    with CollectiveTrace() as trace:
        list(steps(worker, 0, 2))
        worker.checkpoints.save(worker.state, 2, worker.tokens_before(2))
        worker.checkpoints.wait()
    return trace.collectives


def archived(environment: dict[str, str], folder: str, settings: dict[str, Any]) -> list[tuple[int, str]]:
    """Saves after each of three steps; (steps, error) of this rank's copies to the archive."""
    os.environ.update(environment)
    worker = toy_worker(folder, **settings)
    for step in range(3):
        list(steps(worker, step, step + 1))
        worker.checkpoints.save(worker.state, step + 1, worker.tokens_before(step + 1))
    worker.checkpoints.wait()
    return [(one.steps, one.error) for one in worker.checkpoints.archived(last=True)]


def lone_worker(folder: str, vocabulary: int = VOCABULARY, **settings: Any) -> Worker:
    """A worker in a process without other ranks."""
    fields = {"steps": 20, "batch_sequences": SEQUENCES, "workers": 1, "expert_parallel": 1, "moments": "fp8"}
    config = pretrain_config(**fields | settings)
    model = dataclasses.replace(MODEL, vocab_size=vocabulary)
    job = TrainingJob(config, model, LENGTH, folder, "", "pretrain", threads=1)
    return build(job, Mesh.alone(), torch.device("cpu"))


def state_of(worker: Worker) -> dict[str, bytes]:
    """Everything that a checkpoint holds, comparable."""
    biases = {name: bias_E.numpy().tobytes() for name, bias_E in worker.model.logical_biases()}
    return biases | {name: tensor.tobytes() for name, tensor in held(worker).items()}


def left_in_cycles(settings: dict[str, Any]) -> list[str]:
    """The tensors that a step leaves in reference cycles, with their sizes."""
    worker = toy_worker("unused", **settings)
    list(steps(worker, 0, 2))
    gc.collect()
    gc.disable()
    try:
        list(steps(worker, 2, 3))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [f"{tuple(found.shape)} {found.dtype}" for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def index_builds(folder: str, saves: int) -> tuple[int, list[str]]:
    """How often this rank makes an index in a number of saves, the first of which fails, and the saves' errors."""
    built = 0

    def build(listings: list[bytes]) -> bytes:
        nonlocal built
        built += 1
        if built == 1:
            raise ValueError("no index")
        return merge_listings(listings)

    worker = toy_worker(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "merge_listings", build)
        for step in range(1, saves + 1):
            worker.checkpoints.save(worker.state, step, worker.tokens_before(step))
        worker.checkpoints.wait()
    assert worker.checkpoints.restore(worker.state).steps == saves
    return built, [saved.error for saved in worker.checkpoints.ended()]
