"""Training in every precision, in one process, resumes from a checkpoint to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from moray.actors.data.token_set import Batch
from moray.models.presets import preset
from moray.pipelines.pretrain.checkpoint.checkpoints import Checkpoints, Restored
from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.train_step import train_step
from moray.pipelines.pretrain.worker import Worker, build
from tests.pipelines.pretrain.settings import pretrain_config

ALONE = Mesh.alone()


def _worker(folder: Path, **config: object) -> Worker:
    model = dataclasses.replace(preset("tiny"), vocab_size=64, hidden_size=32, num_hidden_layers=2)
    settings = pretrain_config(**{"steps": 8, "batch_sequences": 4, **config})
    job = TrainingJob(settings, model, sequence_length=16, folder=str(folder), events="", step="pretrain", threads=1)
    return build(job, ALONE, torch.device("cpu"))


def _batch(step: int) -> Batch:
    ids = (np.arange(4)[:, None] * 5 + np.arange(16) * 7 + step) % 64
    return Batch(ids.astype(np.int64), np.zeros((4, 16), np.int32), np.ones((4, 16), np.bool_))


def _losses(worker: Worker, first: int, last: int) -> list[float]:
    return [train_step(worker, _batch(step), step)[0]["train_loss"] for step in range(first, last)]


@pytest.mark.parametrize("form", ["float32", "bf16", "fp8"])
def test_it_learns_and_resumes_from_a_checkpoint_to_the_bit(tmp_path: Path, form: str) -> None:
    torch.set_num_threads(1)
    moments = "fp8" if form == "fp8" else "float32"
    worker = _worker(tmp_path, precision=form, moments=moments)
    before = _losses(worker, 0, 4)
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE, keep=1)
    checkpoints.save(worker.state, 4, 256)
    after = _losses(worker, 4, 8)
    assert after[-1] < before[0] - 0.1
    again = _worker(tmp_path, precision=form, moments=moments)
    checkpoints.wait()
    assert checkpoints.restore(again.state) == Restored(4, 256)
    assert _losses(again, 4, 8) == after


def test_the_state_of_fp8_moments_is_small(tmp_path: Path) -> None:
    worker = _worker(tmp_path, moments="fp8")
    held = sum(fragment.tensor.nbytes for fragment in worker.optimizer.fragments())
    parameters = sum(p.numel() for p in worker.model.parameters())
    assert held / parameters < 6.2
