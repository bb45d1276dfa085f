"""Everything that a step reads on a device was written before, by whatever stream: see happens_before.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.permute import sum_slots
from moray.kernels.util.deferred import DeferredGradients
from moray.kernels.util.device import _StreamWork, runtime
from moray.models.expert_parallel.all_to_all import _PendingCollective
from moray.models.expert_parallel.routes import Payload, PendingPayload
from moray.models.expert_parallel.two_hop import TwoHopRoute
from moray.pipelines.pretrain.memory.launches import metered
from moray.pipelines.pretrain.memory.measure import _answers, _batch
from moray.pipelines.pretrain.memory.meter import MemoryMeter
from moray.pipelines.pretrain.memory.row_counts import row_counts
from moray.pipelines.pretrain.memory.stand_ins import unsent_group, unsent_mesh
from moray.pipelines.pretrain.optim import reduction
from moray.pipelines.pretrain.train_step import measure, take
from moray.pipelines.pretrain.worker import assemble
from tests.examples import examples
from tests.pipelines.pretrain.happens_before import MAIN, Current, Stream, Streams, recorded
from tests.pipelines.pretrain.memory.real_steps import LENGTH, job_of

META = torch.device("meta")


def recorded_step(ep: int, width: int, **settings: Any) -> Streams:
    """The second step of a rank of `ep`, which waits for what the first has started."""
    job = job_of({"workers": ep, "expert_parallel": ep, "batch_sequences": 4 * ep, "precision": "bf16"} | settings)
    parallel = job.config.parallel
    counts, pairs_L = row_counts(job.model, ep, width, (parallel.micro_batch_sequences or 4) * LENGTH, 1.0)
    meter, streams = MemoryMeter(_answers(counts, pairs_L)), Streams()
    with pytest.MonkeyPatch.context() as patch, unsent_group(0, ep), metered(meter), recorded(streams):
        patch.setattr(
            reduction, "_MIN_ELEMENTS", 1
        )  # else all of a toy's gradients would be reduced after the backward
        worker = assemble(job, unsent_mesh(0, ep, ep, parallel.shard_ranks or ep, width), META)
        worker.optimizer.refresh_weights()
        for step in range(2):
            take(worker, step, measure(worker, _batch(job, *worker.slots(step)), step))
    return streams


@settings(max_examples=examples(4))
@given(
    layout=st.sampled_from([(2, 1), (4, 1), (4, 2), (8, 2)]),
    zero=st.sampled_from([0, 1, 2, 3]),
    form=st.sampled_from(["bf16", "fp8"]),
    recompute=st.sampled_from(["none", "v3", "layer"]),
    overlap=st.booleans(),
)
def test_every_access_is_ordered_after_the_writes_before_it(
    layout: tuple[int, int], zero: int, form: str, recompute: str, overlap: bool
) -> None:
    ep, width = layout
    found = recorded_step(ep, width, zero_stage=zero, precision=form, recompute=recompute, overlap=overlap)
    assert found.hazards == []
    assert any(stream.startswith("collectives") for stream in found.operations)
    assert any(stream.startswith("queue") for stream in found.operations) == (width > 1)
    assert found.operations[MAIN] > 1000


def forgets_to_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_PendingCollective, "wait", lambda pending: pending.out)


def reads_before_a_queue_has_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Current, "wait_event", lambda stream, event: None)


def starts_a_queue_before_its_input_exists(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "wait_stream", lambda stream, other: None)


def frees_what_a_queue_reads(patch: pytest.MonkeyPatch) -> None:
    def forgetful(work: _StreamWork, run: Callable[[], torch.Tensor], out: torch.Tensor, of: torch.device) -> None:
        made(work, run, out, of)
        work._work = None

    made = _StreamWork.__init__
    patch.setattr(_StreamWork, "__init__", forgetful)


def a_kernel_writes_what_a_queue_reads(patch: pytest.MonkeyPatch) -> None:
    def combined(route: TwoHopRoute, payload: Payload) -> PendingPayload:
        pending = combine(route, payload)
        sum_slots(payload.rows, torch.zeros(1, 1, dtype=torch.int64, device=META))  # it may write all its tensors
        return pending

    combine = TwoHopRoute.start_combine
    patch.setattr(TwoHopRoute, "start_combine", combined)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (forgets_to_wait, "reads what all_to_all_single made, before collectives"),
        (reads_before_a_queue_has_ended, "on main reads what all_to_all_single made, before"),
        (starts_a_queue_before_its_input_exists, "on queue 1 reads what"),
        (frees_what_a_queue_reads, "on main may take the memory of"),
        (a_kernel_writes_what_a_queue_reads, "_sum_slots on main writes what"),
    ],
    ids=lambda one: getattr(one, "__name__", "text"),
)
def test_a_missing_wait_is_found(mistake: Callable[[pytest.MonkeyPatch], None], text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        found = recorded_step(4, 2)
    assert any(text in hazard for hazard in found.hazards), found.hazards[:5]


def test_deferred_gradients_on_a_side_stream_are_found() -> None:
    streams, deferred = Streams(), DeferredGradients()
    with unsent_group(0, 1), metered(MemoryMeter()), recorded(streams):
        deferred.add(lambda: None)
        with runtime(META).side_stream():
            deferred.finish()
    assert streams.hazards == ["deferred gradients run on side 1"]
