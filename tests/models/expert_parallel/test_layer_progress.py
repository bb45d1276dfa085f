"""Gradients are complete once the backward has left their stage, and stages are entered before they run."""

import pytest
import torch

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.layer_progress import LayerProgress
from moray.models.model import DeepseekV3
from tests.models.expert_parallel.overlap_ranks import CONFIG, losses_of, make_batches

LAYERS = CONFIG.num_hidden_layers


def _model(precision, recompute, deferred):
    model = DeepseekV3(CONFIG)
    model.init_weights(3)
    model.train()
    model.set_recompute("v3" if recompute else "none")
    if precision == "fp8":
        model.compute_in(torch.bfloat16)
        model.train_in_fp8()
    model.defer_gradients(deferred)
    return model


class Observer:
    """Records what it is told."""

    def __init__(self, left=lambda stage: None):
        self.told, self._left = [], left

    def forward_enters(self, stage):
        self.told.append(("enter", stage))

    def forward_left(self, stage):
        self.told.append(("leave", stage))

    def backward_enters(self, stage):
        self.told.append(("back into", stage))

    def backward_left(self, stage):
        self.told.append(("back out of", stage))
        self._left(stage)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["float32", "fp8"])
@pytest.mark.parametrize(("batches", "defer"), [(1, False), (2, True)])
def test_gradients_are_complete_when_the_backward_has_left_their_stage(precision, recompute, batches, defer):
    deferred = DeferredGradients() if defer else None
    model = _model(precision, recompute, deferred)
    passed = {}

    def note(stage):
        if deferred is not None:
            deferred.finish(deferred.added)
        own = [(name, p) for name, p in model.named_parameters() if model.stage_of(name) == stage]
        passed[stage] = {name: parameter.grad.clone() for name, parameter in own}

    model.progress = LayerProgress(Observer(note), LAYERS)
    model.progress.micro_batches = batches
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


def test_stages_are_in_the_order_of_parameters():
    model = DeepseekV3(CONFIG)
    numbers = [model.stage_of(parameter.name) for parameter in model.logical_parameters()]
    assert numbers == sorted(numbers)
    assert set(numbers) == {-1, *range(LAYERS + 1)}


@pytest.mark.parametrize("batches", [1, 2])
def test_a_stage_is_entered_before_it_runs_and_left_after_all_have_run_it(batches):
    observer = Observer()
    model = _model("float32", False, None)
    model.progress = LayerProgress(observer, LAYERS)
    model.progress.micro_batches = batches
    losses = losses_of(model, make_batches(torch.Generator().manual_seed(1), *[2] * batches), batches == 2)
    forward = [told for told in observer.told if told[0] == "enter"]
    assert forward == [("enter", stage) for stage in range(-1, LAYERS + 1)]
    assert [stage for told, stage in observer.told if told == "leave"] == list(range(-1, LAYERS + 1))
    at = {told: number for number, told in enumerate(observer.told)}
    overlapping = [stage for stage in range(LAYERS) if at["leave", stage] > at["enter", stage + 1]]
    assert overlapping == ([] if batches == 1 else list(range(LAYERS)))  # one frees a stage before it allocates
    observer.told.clear()
    model.progress.begin_backward()
    sum(loss.main + loss.mtp for loss in losses).backward()
    model.progress.end_backward()
    at = {told: number for number, told in enumerate(observer.told)}
    assert len(at) == len(observer.told) == 2 * (LAYERS + 2)
    for stage in range(-1, LAYERS + 1):
        assert at["back into", stage] < at["back out of", stage]
    if batches == 1:
        assert at["back out of", LAYERS] < at["back into", LAYERS - 1]


def test_forwards_without_gradients_are_not_waited_for_in_the_backward():
    observer = Observer()
    model = _model("float32", False, None)
    model.progress = LayerProgress(observer, LAYERS)
    ((ids, targets, _),) = make_batches(torch.Generator().manual_seed(1), 2)
    with torch.no_grad():
        model.training_loss(ids, targets)
    model.training_loss(ids, targets).main.backward()
    assert [stage for told, stage in observer.told if told == "back out of"] == list(range(LAYERS, -1, -1))


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
