"""Everything that a step reads on a device was written before, by whatever stream: see happens_before.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.util.deferred import DeferredGradients
from moray.kernels.util.device import runtime
from moray.models.expert_parallel.all_to_all import _PendingCollective
from moray.pipelines.pretrain.memory.measure import _answers, _batch
from moray.pipelines.pretrain.memory.meter import MemoryMeter
from moray.pipelines.pretrain.memory.row_counts import row_counts
from moray.pipelines.pretrain.memory.stand_ins import metered, unsent_group, unsent_mesh
from moray.pipelines.pretrain.train_step import measure, take
from moray.pipelines.pretrain.worker import assemble
from tests.examples import examples
from tests.pipelines.pretrain.happens_before import MAIN, Issued, Queue, Streams, recorded
from tests.pipelines.pretrain.memory.real_steps import LENGTH, job_of

META = torch.device("meta")


def recorded_step(ep: int, width: int, **settings: Any) -> Streams:
    """The second step of a rank of `ep`, which waits for what the first has started."""
    job = job_of({"workers": ep, "expert_parallel": ep, "batch_sequences": 4 * ep, "precision": "bf16"} | settings)
    parallel = job.config.parallel
    counts, pairs_L = row_counts(job.model, ep, width, (parallel.micro_batch_sequences or 4) * LENGTH, 1.0)
    meter, streams = MemoryMeter(_answers(counts, pairs_L)), Streams()
    with unsent_group(0, ep), metered(meter), recorded(streams):
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
    patch.setattr(Issued, "wait", lambda issued: issued._out)


def starts_a_queue_before_its_input_exists(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "start", lambda queue, work: Issued(queue._streams, queue._stream, work))


def frees_what_a_queue_reads(patch: pytest.MonkeyPatch) -> None:
    def forgetful(issued: Issued, streams: Streams, stream: str, work: Callable[[], torch.Tensor]) -> None:
        start(issued, streams, stream, work)
        issued._work.clear()

    start = Issued.__init__
    patch.setattr(Issued, "__init__", forgetful)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (forgets_to_wait, "reads what all_to_all_single made, before collectives"),
        (reads_before_a_queue_has_ended, "on main reads what all_to_all_single made, before"),
        (starts_a_queue_before_its_input_exists, "on queue 1 reads what"),
        (frees_what_a_queue_reads, "on main may take the memory of"),
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
