"""The EMA of the weights, compared with float64. test_checkpoints.py tests that it is saved and loaded to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed
from moray.pipelines.pretrain.checkpoint.stored_weights import read_weights
from tests.pipelines.pretrain.training_ranks import LENGTH, SEQUENCES, held, lone_worker, steps

HALF_LIFE = 3 * SEQUENCES * LENGTH


def test_the_average_decays_by_half_in_a_half_life_of_tokens(tmp_path: Path) -> None:
    worker = lone_worker(str(tmp_path), ema_half_life_tokens=HALF_LIFE)
    masters = [key for key in held(worker) if key.startswith("master/")]
    expected: dict[str, npt.NDArray[np.float64]] = {key: held(worker)[key].astype(np.float64) for key in masters}
    kept = 0.5 ** (1 / 3)
    for step in range(6):
        list(steps(worker, step, step + 1))
        state = held(worker)
        for key in masters:
            expected[key] = kept * expected[key] + (1 - kept) * state[key]
    for key in masters:
        average = state[key.replace("master/", "ema/")]
        np.testing.assert_allclose(average, expected[key], rtol=1e-5, atol=1e-7)
        assert not np.array_equal(average, state[key]), "the average lags behind"


def test_the_average_is_read_back_under_the_models_names(tmp_path: Path) -> None:
    worker = lone_worker(str(tmp_path), ema_half_life_tokens=HALF_LIFE)
    list(steps(worker, 0, 2))
    worker.checkpoints.save(worker.state, 2, worker.tokens_before(2))
    worker.checkpoints.wait()
    folder = tmp_path / "checkpoints" / "step-00000002"
    last, average = dict(read_weights(folder)), dict(read_weights(folder, "ema"))
    assert last.keys() == average.keys()
    assert any(not last[name].equal(average[name]) for name in last)


def test_a_checkpoint_without_an_average_is_an_error(tmp_path: Path) -> None:
    worker = lone_worker(str(tmp_path))
    worker.checkpoints.save(worker.state, 0, 0)
    worker.checkpoints.wait()
    with pytest.raises(CheckpointFailed, match="no ema weights"):
        next(read_weights(tmp_path / "checkpoints" / "step-00000000", "ema"))
