"""The archive with a real S3 server: all checkpoints are copied, a fresh machine resumes, an outage loses none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.checkpoint.checkpoint_files import CHECKSUMS
from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed
from moray.pipelines.pretrain.worker import Worker
from tests.pipelines.pretrain.training_ranks import archived, lone_worker, state_of, steps
from tests.ranks import RankPool
from tests.s3 import BUCKET, KEYS, Request, faulty_proxy, keys

DENIED = (403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>")


@pytest.fixture
def bucket(s3: Any) -> str:
    return f"s3://{BUCKET}/archive"


def saved(worker: Worker, at: int) -> list[str]:
    """Trains a step, saves, waits for the copies. Returns their errors."""
    list(steps(worker, at - 1, at))
    worker.checkpoints.save(worker.state, at, worker.tokens_before(at))
    worker.checkpoints.wait()
    return [one.error for one in worker.checkpoints.archived(last=True)]


def on_disk(folder: Path) -> list[int]:
    return checkpoint_files.complete_steps(folder / "checkpoints")


def test_the_newest_are_on_disk_and_all_are_in_the_archive(tmp_path: Path, bucket: str, s3: Any) -> None:
    worker = lone_worker(str(tmp_path), archive=bucket, keep_checkpoints=1)
    states = {}
    for at in range(1, 4):
        assert saved(worker, at) == [""]
        states[at] = state_of(worker)
    assert on_disk(tmp_path) == [3]
    for at in (3, 2, 1):  # on a fresh machine each time
        fresh = lone_worker(str(tmp_path / f"fresh-{at}" / tmp_path.name), archive=bucket)
        restored = fresh.checkpoints.restore(fresh.state)
        assert (restored.steps, restored.fetched, restored.warnings) == (at, True, ())
        assert state_of(fresh) == states[at]
        listing = next(key for key in keys(s3) if key.endswith(f"step-{at:08d}/{CHECKSUMS}"))
        s3.delete_object(Bucket=BUCKET, Key=listing)  # now it is incomplete


def test_two_ranks_copy_their_shares(tmp_path: Path, bucket: str, s3_url: str, s3: Any, ranks: RankPool) -> None:
    settings = {"archive": bucket, "keep_checkpoints": 1, "expert_parallel": 2, "moments": "fp8"}
    ended = ranks.run(2, archived, {**KEYS, "AWS_ENDPOINT_URL": s3_url}, str(tmp_path), settings)
    assert {at for at, error in ended[0] if not error} == {1, 2, 3}
    assert not [error for rank in ended for _, error in rank if error]
    assert len([key for key in keys(s3) if key.endswith(f"/{CHECKSUMS}")]) == 3
    shutil.rmtree(tmp_path / "checkpoints")
    fresh = lone_worker(str(tmp_path), archive=bucket, ema_half_life_tokens=1)
    assert fresh.checkpoints.restore(fresh.state).steps == 3


def test_an_unwritable_archive_only_uses_disk_space(
    tmp_path: Path, bucket: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = [True]

    def fault(request: Request) -> str | tuple[int, str]:
        return DENIED if refusing[0] and request.method == "PUT" else "pass"

    with faulty_proxy(s3_url, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        worker = lone_worker(str(tmp_path), archive=bucket, keep_checkpoints=1)
        for at in (1, 2):
            errors = saved(worker, at)
            assert errors, "it is tried"
            assert all("access denied" in error for error in errors)
        assert on_disk(tmp_path) == [1, 2], "checkpoints that are not archived are kept"
        refusing[0] = False
        saved(worker, 3)
        assert saved(worker, 4) == [""]
        assert on_disk(tmp_path) == [4]
    archive = worker.checkpoints._archive
    assert archive is not None
    assert all(archive.has(at) for at in (1, 2, 3, 4))


def test_a_damaged_archived_checkpoint_is_not_used(tmp_path: Path, bucket: str, s3: Any) -> None:
    worker = lone_worker(str(tmp_path), archive=bucket)
    saved(worker, 1)
    expected = state_of(worker)
    saved(worker, 2)
    victim = next(key for key in keys(s3) if "step-00000002" in key and key.endswith(".distcp"))
    data = bytearray(s3.get_object(Bucket=BUCKET, Key=victim)["Body"].read())
    data[len(data) // 2] ^= 1
    s3.put_object(Bucket=BUCKET, Key=victim, Body=bytes(data))
    shutil.rmtree(tmp_path / "checkpoints")
    fresh = lone_worker(str(tmp_path), archive=bucket)
    restored = fresh.checkpoints.restore(fresh.state)
    assert (restored.steps, restored.fetched) == (1, True)
    assert "in the archive is damaged" in restored.warnings[0]
    assert state_of(fresh) == expected


def test_a_damaged_checkpoint_on_disk_is_fetched_again(tmp_path: Path, bucket: str) -> None:
    worker = lone_worker(str(tmp_path), archive=bucket)
    saved(worker, 1)
    expected = state_of(worker)
    victim = next((tmp_path / "checkpoints" / "step-00000001").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    fresh = lone_worker(str(tmp_path), archive=bucket)
    restored = fresh.checkpoints.restore(fresh.state)
    assert (restored.steps, restored.fetched) == (1, True)
    assert state_of(fresh) == expected


def test_an_unavailable_archive_is_an_error_only_if_nothing_is_on_disk(
    tmp_path: Path, bucket: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(lone_worker(str(tmp_path), archive=bucket), 1)
    with faulty_proxy(s3_url, lambda request: DENIED) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        worker = lone_worker(str(tmp_path), archive=bucket)
        restored = worker.checkpoints.restore(worker.state)
        assert restored.steps == 1
        assert "the archive is unavailable" in restored.warnings[0]
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(CheckpointFailed, match="access denied"):
            worker.checkpoints.restore(worker.state)
