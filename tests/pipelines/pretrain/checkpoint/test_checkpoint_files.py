"""Checkpoint folders: commit, verification and retention; and reports of damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.checkpoint.checkpoint_files import (
    commit,
    complete_steps,
    find_damage,
    list_hashed_files,
    outdated,
    path_of,
    prepare,
    remove_checkpoint,
)
from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed, Restored
from tests.pipelines.pretrain.training_ranks import lone_worker, state_of, steps


def write(folder: Path, at: int, age: float = 0.0, now: float = 1e9) -> Path:
    """A complete checkpoint of two files, `age` hours old."""
    prepare(folder, at)
    unfinished = checkpoint_files.unfinished_path(folder, at)
    (unfinished / "__0_0.distcp").write_bytes(b"tensors of step %d" % at)
    (unfinished / ".metadata").write_bytes(b"where they are")
    commit(folder, at, list_hashed_files(unfinished, ["__0_*", ".metadata"]))
    path = path_of(folder, at)
    os.utime(path, (now - age * 3600, now - age * 3600))
    return path


def test_a_checkpoint_is_complete_when_it_has_its_name(tmp_path: Path) -> None:
    assert complete_steps(tmp_path) == []
    write(tmp_path, 10)
    prepare(tmp_path, 20)
    assert complete_steps(tmp_path) == [10]
    assert not find_damage(tmp_path, 10)
    write(tmp_path, 30)
    assert complete_steps(tmp_path) == [10, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(1, 5), st.none() | st.floats(1, 100))
def test_retention_keeps_the_newest_and_recent_ones_up_to_the_limit(
    tmp_path_factory: pytest.TempPathFactory, ages: list[float], keep: int, hours: float | None
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    ages = sorted(ages, reverse=True)
    for at, age in enumerate(ages):
        path_of(folder, at).mkdir()
        os.utime(path_of(folder, at), (1e9 - age * 3600,) * 2)
    removed = outdated(folder, keep, hours, now=1e9)
    for at, age in enumerate(ages):
        too_many = at < len(ages) - keep
        too_old = hours is not None and age > hours + 1e-3
        fresh = hours is None or age < hours - 1e-3
        if at == len(ages) - 1 or (fresh and not too_many):
            assert at not in removed
        elif too_many or too_old:
            assert at in removed
    for at in removed:
        remove_checkpoint(folder, at)
    assert complete_steps(folder) == [at for at in range(len(ages)) if at not in removed]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARM: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit": ("the SHA-256 of __0_0.distcp does not match", lambda at: flip(at / "__0_0.distcp")),
    "half a file": ("bytes instead of", lambda at: os.truncate(at / "__0_0.distcp", 100)),
    "a lost file": ("cannot read __0_0.distcp: No such file", lambda at: (at / "__0_0.distcp").unlink()),
    "a flipped bit in the index": ("the SHA-256 of .metadata does not match", lambda at: flip(at / ".metadata")),
    "no checksums": ("cannot read checksums.json", lambda at: (at / "checksums.json").unlink()),
    "torn checksums": ("cannot read checksums.json", lambda at: os.truncate(at / "checksums.json", 50)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, bytes]]]:
    """A folder with checkpoints at steps 2 and 4, and what they hold."""
    folder = tmp_path_factory.mktemp("trained")
    worker, states = lone_worker(str(folder)), {}
    for at in (2, 4):
        list(steps(worker, at - 2, at))
        worker.checkpoints.save(worker.state, at, worker.tokens_before(at))
        states[at] = state_of(worker)
    worker.checkpoints.wait()
    saved = worker.checkpoints.ended()
    assert [(one.steps, one.error) for one in saved] == [(2, ""), (4, "")]
    size = sum(path.stat().st_size for path in (folder / "checkpoints" / "step-00000004").iterdir())
    assert 0 < size - saved[-1].bytes < 4096  # the checksums themselves
    assert all(0 < one.stalled <= one.seconds for one in saved)
    return folder, states


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_found_and_the_previous_one_is_used(
    trained: tuple[Path, dict[int, dict[str, bytes]]], tmp_path: Path, harm: str
) -> None:
    folder, (says, damage_it) = copy_of(trained[0], tmp_path / "copy"), HARM[harm]
    damage_it(folder / "checkpoints" / "step-00000004")
    worker = lone_worker(str(folder))
    restored = worker.checkpoints.restore(worker.state)
    assert restored.steps == 2
    assert len(restored.warnings) == 1
    assert "step 4 is damaged and is not used" in restored.warnings[0]
    assert says in restored.warnings[0]
    assert state_of(worker) == trained[1][2]
    assert (folder / "checkpoints" / "damaged-step-00000004").is_dir()


def test_training_resumes_from_the_previous_one_and_reuses_the_name_of_the_damaged_one(
    trained: tuple[Path, dict[int, dict[str, bytes]]], tmp_path: Path
) -> None:
    folder = copy_of(trained[0], tmp_path / "copy")
    flip(folder / "checkpoints" / "step-00000004" / "__0_0.distcp")
    worker = lone_worker(str(folder))
    assert worker.checkpoints.restore(worker.state).steps == 2
    list(steps(worker, 2, 4))
    worker.checkpoints.save(worker.state, 4, worker.tokens_before(4))
    worker.checkpoints.wait()
    assert [one.error for one in worker.checkpoints.ended()] == [""]
    assert state_of(worker) == trained[1][4]


def test_without_any_good_checkpoint_training_starts_over_with_warnings(
    trained: tuple[Path, dict[int, dict[str, bytes]]], tmp_path: Path
) -> None:
    folder = copy_of(trained[0], tmp_path / "copy")
    for at in (2, 4):
        flip(folder / "checkpoints" / f"step-{at:08d}" / "__0_0.distcp")
    worker = lone_worker(str(folder))
    restored = worker.checkpoints.restore(worker.state)
    assert (restored.steps, restored.tokens, len(restored.warnings)) == (0, 0, 2)
    assert lone_worker(str(tmp_path)).checkpoints.restore(worker.state) == Restored(0, 0)


def test_a_checkpoint_holds_the_state_at_the_time_of_the_save(tmp_path: Path) -> None:
    """Training continues while the checkpoint is written, and does not change it."""
    worker = lone_worker(str(tmp_path))
    list(steps(worker, 0, 1))
    expected = state_of(worker)
    worker.checkpoints.save(worker.state, 1, worker.tokens_before(1))
    list(steps(worker, 1, 3))
    worker.checkpoints.wait()
    again = lone_worker(str(tmp_path))
    again.checkpoints.restore(again.state)
    assert state_of(again) == expected
    assert state_of(worker) != expected


def test_a_failed_save_is_reported_and_the_previous_one_is_kept(tmp_path: Path) -> None:
    worker = lone_worker(str(tmp_path))
    list(steps(worker, 0, 1))
    worker.checkpoints.save(worker.state, 1, worker.tokens_before(1))
    worker.checkpoints.wait()
    (tmp_path / "checkpoints" / ".step-00000002").write_text("a file where a folder must be made")
    worker.checkpoints.save(worker.state, 2, worker.tokens_before(2))
    worker.checkpoints.wait()
    good, bad = worker.checkpoints.ended()
    assert not good.error
    assert "Not a directory" in bad.error
    assert complete_steps(tmp_path / "checkpoints") == [1]


def test_a_checkpoint_of_another_model_is_one_error(
    trained: tuple[Path, dict[int, dict[str, bytes]]], tmp_path: Path
) -> None:
    folder = copy_of(trained[0], tmp_path / "copy")
    worker = lone_worker(str(folder), vocabulary=65)
    with pytest.raises(CheckpointFailed, match=r"cannot read .*step-00000004: Size mismatch"):
        worker.checkpoints.restore(worker.state)
