"""Initial weights: a host holds little more than one tensor, whether they are drawn or read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moray.models import checkpoint
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.worker import assemble, initialize
from tests.pipelines.pretrain.memory.real_steps import allocated
from tests.pipelines.pretrain.settings import pretrain_config

MODEL = dataclasses.replace(preset("tiny"), vocab_size=1 << 15, num_hidden_layers=2, hidden_size=128)
LARGEST = MODEL.vocab_size * MODEL.hidden_size * 4


def peak(action: Callable[[], None]) -> int:
    """Bytes that torch allocates at most, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        action()
    return allocated(profiled)


def test_a_host_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    source = DeepseekV3(MODEL)
    source.init_weights(1)
    checkpoint.save(source, tmp_path / "model")
    settings = pretrain_config(steps=1, workers=1, expert_parallel=1, zero_stage=3)
    for initial in (None, str(tmp_path / "model")):
        job = TrainingJob(settings, MODEL, 16, str(tmp_path / "run"), "", "pretrain", 1, initial)
        worker = assemble(job, Mesh.alone(), torch.device("cpu"))
        assert all(parameter.isnan().all() for parameter in worker.model.parameters())
        assert peak(lambda worker=worker: initialize(worker)) <= 1.2 * LARGEST
        expected = {name: view for name, view, _ in source.logical_parameters()}
        for name, view, _ in worker.model.logical_parameters():
            assert torch.equal(view, expected[name]), name
