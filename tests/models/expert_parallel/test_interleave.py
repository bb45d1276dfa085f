"""Two interleaved batches give the same numbers as one after the other; each computes while the other's rows are in
flight."""

import pytest
import torch

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.dispatcher import LocalDispatcher
from moray.models.expert_parallel.interleave import interleave, run_alone
from moray.models.model import DeepseekV3
from tests.models.expert_parallel.overlap_ranks import CONFIG, check_overlap, check_same, losses_of, make_batches


def _parts(name, count, log):
    for number in range(count):
        log.append(f"{name}{number}")
        yield
    return name


def test_parts_run_round_robin_and_results_keep_their_order():
    log = []
    assert interleave([_parts("a", 1, log), _parts("b", 3, log), _parts("c", 0, log)]) == ["a", "b", "c"]
    assert log == ["a0", "b0", "b1", "b2"]
    assert run_alone(_parts("d", 2, log)) == "d"


class RecordingDispatcher:
    """A dispatcher that records starts and waits, forward and backward, by the size of the batch."""

    def __init__(self, log):
        self._inner, self._log = LocalDispatcher(), log

    def dispatch(self, rows_TD, routing, fp8=False, layer=0):
        handle = self._inner.dispatch(rows_TD, routing, fp8)
        start, finish = handle.start, handle.finish

        def starts(direction, payload):
            self._log.append(("starts", len(rows_TD)))
            start(direction, payload)

        def waits():
            self._log.append(("waits", len(rows_TD)))
            return finish()

        handle.start, handle.finish = starts, waits
        return handle


def _model(**how):
    model = DeepseekV3(CONFIG, **how)
    model.init_weights(3)
    model.train()
    return model


def test_the_backward_overlaps_the_same_computation():
    log = []
    model = _model(dispatcher=RecordingDispatcher(log))
    small, large = torch.randint(0, 40, (1, 8)), torch.randint(0, 40, (2, 8))
    losses = interleave([model.training_parts(ids, ids) for ids in (small, large)])
    forward, log[:] = list(log), []
    (losses[0].main + losses[1].main + losses[0].mtp + losses[1].mtp).backward()
    turns = [("starts", 8), ("starts", 16), ("waits", 8), ("starts", 8), ("waits", 16), ("starts", 16),
             ("waits", 8)]  # fmt: skip
    assert forward[: len(turns)] == turns
    assert forward[-1] == ("waits", 16)
    other = {"starts": "waits", "waits": "starts"}
    assert log == [(other[event], size) for event, size in reversed(forward)]


@pytest.mark.parametrize("recompute", ["none", "v3", "layer"])
@pytest.mark.parametrize("precision", ["float64", "float32", "bf16", "fp8"])
def test_deferred_gradients_are_bit_identical(precision, recompute):
    batches = make_batches(torch.Generator().manual_seed(1), 2, 2)
    found = []
    for limit in (None, 0, 3, 1000):
        model = _model()
        model.set_recompute(recompute)
        if precision == "float64":
            model.double()
        if precision in ("bf16", "fp8"):
            model.compute_in(torch.bfloat16)
        if precision == "fp8":
            model.train_in_fp8()
        deferred = None if limit is None else DeferredGradients(limit)
        model.defer_gradients(deferred)
        losses = losses_of(model, batches, deferred is not None)
        loss = sum(loss.main + 0.3 * loss.mtp + loss.balance for loss in losses)
        loss.backward()
        if deferred is not None:
            assert len(deferred) <= limit
            deferred.finish()
            assert not len(deferred)
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        for name, gradient in gradients.items():
            assert gradient is not None, name
            check_same(name, gradient, found[0][1][name])


def test_overlapping_ranks_compute_the_same(ranks):
    """At EP 2 and 4 over gloo; see overlap_ranks.py."""
    ranks.run(4, check_overlap)
