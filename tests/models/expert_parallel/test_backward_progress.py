"""Gradients are complete once the backward has passed their milestone: nothing is added to them afterwards."""

from collections import Counter

import pytest
import torch

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.backward_progress import Milestones
from moray.models.model import DeepseekV3
from tests.models.expert_parallel.overlap_ranks import CONFIG, losses_of, make_batches

LAYERS = CONFIG.num_hidden_layers


def _model(precision, recompute, deferred):
    model = DeepseekV3(CONFIG)
    model.init_weights(3)
    model.train()
    model.set_recompute(recompute)
    if precision == "fp8":
        model.compute_in(torch.bfloat16)
        model.train_in_fp8()
    model.defer_gradients(deferred)
    return model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["float32", "fp8"])
@pytest.mark.parametrize(("batches", "defer"), [(1, False), (2, True)])
def test_gradients_are_complete_when_their_milestone_is_passed(precision, recompute, batches, defer):
    deferred = DeferredGradients() if defer else None
    model = _model(precision, recompute, deferred)
    passed = {}

    def note(number):
        if deferred is not None:
            deferred.finish(deferred.added)
        own = [(name, p) for name, p in model.named_parameters() if model.milestone_of(name) == number]
        passed[number] = {name: parameter.grad.clone() for name, parameter in own}

    model.milestones = Milestones(note)
    losses = losses_of(model, make_batches(torch.Generator().manual_seed(1), *[2] * batches), batches == 2)
    sum(loss.main + 0.3 * loss.mtp + loss.balance for loss in losses).backward()
    if deferred is not None:
        deferred.finish()
    assert list(passed) == list(range(LAYERS, -1, -1))
    for gradients in passed.values():
        assert gradients
        for name, gradient in gradients.items():
            assert gradient.any(), name
            assert torch.equal(gradient, model.get_parameter(name).grad), name


def test_milestones_are_in_the_order_of_parameters():
    model = DeepseekV3(CONFIG)
    numbers = [model.milestone_of(parameter.name) for parameter in model.logical_parameters()]
    assert numbers == sorted(numbers)
    assert set(numbers) == {-1, *range(LAYERS + 1)}


def test_forwards_without_gradients_have_no_milestones():
    model, passed = _model("float32", False, None), []
    model.milestones = Milestones(passed.append)
    ((ids, targets, _),) = make_batches(torch.Generator().manual_seed(1), 2)
    with torch.no_grad():
        model.training_loss(ids, targets)
    model.training_loss(ids, targets).main.backward()
    assert Counter(passed) == Counter(range(LAYERS + 1))


def test_finish_computes_the_oldest_deferred_gradients_first():
    deferred, done = DeferredGradients(), []
    for number in range(5):
        deferred.add(lambda number=number: done.append(number))
    deferred.fill(lambda: len(done) == 1)
    deferred.finish(3)
    assert done == [0, 1, 2]
    deferred.finish(2)
    assert len(deferred) == 2
    deferred.finish()
    assert done == [0, 1, 2, 3, 4]
