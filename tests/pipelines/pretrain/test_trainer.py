"""The private methods of Ray Train that the trainer overrides."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from moray.models.presets import preset
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob
from moray.pipelines.pretrain.trainer import UNUSED, make_trainer
from moray.platform.core.cluster import Topology

pytestmark = pytest.mark.heavy  # it takes no cluster, but seconds to import Ray


def test_ray_trains_unused_actors_are_not_started(tmp_path: Path) -> None:
    """Fails for a version of Ray that starts them in another way."""
    config = PretrainConfig(steps=1, batch_sequences=2)
    job = TrainingJob(
        config, preset("tiny"), 16, str(tmp_path / "run"), str(tmp_path / "events"), "pretrain", threads=1
    )
    trainer = make_trainer(job, {}, str(tmp_path / "train"), Topology(2, 0, 1 << 30))
    before = {type(one).__name__ for one in super(type(trainer), trainer)._create_default_callbacks()}
    after = {type(one).__name__ for one in trainer._create_default_callbacks()}
    assert before - after == set(UNUSED)
    assert after, "what sets up torch and reports metrics stays"
    assert "_create_default_callbacks" in inspect.getsource(type(trainer).fit)


def test_ray_train_installs_its_ctrl_c_handler_by_the_overridden_method() -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    source = inspect.getsource(DataParallelTrainer)
    assert "self._register_sigint_handler(controller)" in source
    assert "signal.signal(" not in source.replace(inspect.getsource(DataParallelTrainer._register_sigint_handler), "")
