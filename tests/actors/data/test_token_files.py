"""Tokens read by ranges from a real S3 server equal those of a folder, also with server faults."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.data_worker import DataWorker
from moray.actors.data.token_set import open_token_sets
from moray.platform.core.errors import InputError
from tests.actors.data.test_token_set import write
from tests.s3 import BUCKET, Request, faulty_proxy

PLAN = BatchPlan.constant(16)
ADDRESS = f"s3://{BUCKET}/root/tokenize/f/w-1/train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    for name in ("a", "b"):
        write(folder / name, [[[shard * 100 + i + 3] * (7 + i) for i in range(40)] for shard in range(3)])
    return folder


@pytest.fixture(autouse=True)
def uploaded(folder: Path, s3: Any) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{ADDRESS.removeprefix(f's3://{BUCKET}/')}/{path.relative_to(folder)}"
            s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())


def assert_same_batches(folder: Path, address: str = ADDRESS) -> None:
    here, there = (DataWorker(where, {"a": 2.0, "b": 1.0}, 5, PLAN) for where in (str(folder), address))
    for step in range(3):
        expected, found = (worker.batch(step, 0, 16).unpacked() for worker in (here, there))
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.documents, expected.documents)
        np.testing.assert_array_equal(found.mask, expected.mask)


def test_a_bucket_equals_a_folder(folder: Path) -> None:
    assert_same_batches(folder)
    here, there = open_token_sets(str(folder)), open_token_sets(ADDRESS)
    for source, tokens in here.items():
        for shard in tokens.shards:
            np.testing.assert_array_equal(there[source].stream(shard), tokens.stream(shard))
            assert there[source].pieces(shard).equals(tokens.pieces(shard))


def test_only_the_requested_ranges_are_read(folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def watch(request: Request) -> str:
        if request.method == "GET" and request.key.endswith(".bin"):
            asked.append(request.headers.get("Range", "everything"))
        return "pass"

    with faulty_proxy(s3_url, watch) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        DataWorker(ADDRESS, {}, 5, PLAN).batch(0, 3, 7)
    assert len(asked) == 4
    assert all(range_.startswith("bytes=") for range_ in asked)


@pytest.mark.parametrize("fault", ["half", "drop", (503, "<Error><Code>SlowDown</Code></Error>")], ids=str)
def test_retries_survive_faults_in_every_other_response(
    fault: str | tuple[int, str], folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def spoil(request: Request) -> str | tuple[int, str]:
        """A fault for the first request of a range."""
        what = request.path + request.headers.get("Range", "")
        with lock:
            seen[what] = seen.get(what, 0) + 1
        return fault if request.key.endswith(".bin") and seen[what] == 1 else "pass"

    with faulty_proxy(s3_url, spoil) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert_same_batches(folder)
    assert max(seen.values()) > 1


def test_a_read_that_hangs_is_retried(folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.actors.data.token_files._READ_TIMEOUT", 0.3)
    released = threading.Event()
    hung: list[str] = []

    def hang(request: Request) -> str:
        if request.key.endswith(".bin") and not hung:
            hung.append(request.key)
            released.wait(60)
        return "pass"

    with faulty_proxy(s3_url, hang) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert_same_batches(folder)
        assert hung
        released.set()


def test_an_object_that_is_missing_or_short_is_named(folder: Path, s3: Any) -> None:
    with pytest.raises(ValueError, match="contains no token set"):
        open_token_sets(f"s3://{BUCKET}/nothing")
    bad = f"s3://{BUCKET}/bad"
    s3.put_object(Bucket=BUCKET, Key="bad/a/index.json", Body=(folder / "a" / "index.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"bad/a/tokens-00000\.bin is missing"):
        open_token_sets(bad)
    s3.put_object(Bucket=BUCKET, Key="bad/a/tokens-00000.bin", Body=b"short")
    with pytest.raises(ValueError, match="has 5 bytes; its index requires"):
        open_token_sets(bad)
    sets = open_token_sets(ADDRESS)
    s3.delete_object(Bucket=BUCKET, Key=f"{ADDRESS.removeprefix(f's3://{BUCKET}/')}/a/tokens-00001.bin")
    with pytest.raises(InputError, match=r"a/tokens-00001\.bin is missing"):
        sets["a"].batch(range(sets["a"].sequences))
