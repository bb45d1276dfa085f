"""Leases in a store: one holder, whatever the clocks say and however processes end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moray.platform.store import store_lease
from moray.platform.store.paths import StorePath, bucket_at
from moray.platform.store.store_lease import LeaseWatch, StoreLease
from tests.s3 import BUCKET, Request, faulty_proxy, keys

pytestmark = pytest.mark.s3  # a real S3 server

PLACE = StorePath(f"s3://{BUCKET}/root", "step/ab/leases")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any) -> Iterator[None]:
    monkeypatch.setenv("MORAY_HOME", str(tmp_path / "host"))
    bucket_at.cache_clear()
    yield
    bucket_at.cache_clear()


class Clock:
    """A monotonic clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(store_lease.time, "monotonic", made.monotonic)
    return made


def die(lease: StoreLease) -> None:
    """Ends the heartbeat, as a power cut does."""
    lease._stop.set()
    assert lease._thread is not None
    lease._thread.join()


def test_one_process_holds_a_lease_and_the_next_gets_it_after_its_release(s3: Any) -> None:
    first, second = StoreLease(PLACE), StoreLease(PLACE)
    assert first.acquire()
    assert not second.acquire()
    assert second.holder()["pid"] > 0
    first.release()
    assert not keys(s3, "root/step")
    assert second.acquire()
    second.release()
    first.release()  # again: no error


def test_a_dead_holder_is_replaced_by_exactly_one(clock: Clock) -> None:
    dead = StoreLease(PLACE)
    assert dead.acquire()
    die(dead)
    others = [StoreLease(PLACE) for _ in range(3)]
    assert not any(one.acquire() for one in others)  # they begin to observe it
    clock.now = 1000.0  # an outage, or a suspended machine: nobody could have seen a heartbeat
    assert not any(one.acquire() for one in others)
    for _ in range(3):
        clock.now += 4
        assert not any(one.acquire() for one in others)
    clock.now += 4
    assert [one.acquire() for one in others] == [True, False, False]
    assert not StoreLease(PLACE).acquire()
    others[0].release()
    assert others[1].acquire()
    others[1].release()


def test_a_holder_that_beats_is_never_replaced(clock: Clock) -> None:
    holder, other = StoreLease(PLACE), StoreLease(PLACE)
    assert holder.acquire()
    for _ in range(20):
        clock.now += 4
        holder._bucket.put(holder._key(), holder._body("same"))  # a beat
        assert not other.acquire()
    holder.release()


def test_a_creation_whose_answer_is_lost_is_a_success(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Request] = []

    def lose_first(request: Request) -> str:
        if request.method == "PUT" and not lost:
            lost.append(request)
            return "mute"
        return "pass"

    with faulty_proxy(s3_url, lose_first) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        bucket_at.cache_clear()
        lease = StoreLease(PLACE)
        assert lease.acquire()
        assert lost
        lease.release()


def test_waiting_ends_when_the_work_is_done_or_the_lease_is_free() -> None:
    holder, other = StoreLease(PLACE), StoreLease(PLACE)
    assert holder.acquire()
    assert not other.wait(lambda: True, lambda: False)
    assert not other.wait(lambda: False, lambda: True)
    holder.release()
    assert other.wait(lambda: False, lambda: False)
    other.release()


def test_a_watch_judges_by_what_it_saw_itself(clock: Clock) -> None:
    holder, watch = StoreLease(PLACE), LeaseWatch(PLACE)
    assert watch.number() == 0
    assert holder.acquire()
    clock.now = 1000.0  # long after the last observation
    assert watch.number() == 1
    assert not watch.is_stale()
    die(holder)
    judged = []
    for _ in range(9):
        clock.now += 4
        watch.number()
        judged.append(watch.is_stale())
    assert judged == [False] * 5 + [True] * 4


def test_a_retry_does_not_wait_for_the_attempt_that_it_replaces() -> None:
    dead, retry = StoreLease(PLACE, "a-job.1"), StoreLease(PLACE, "a-job.2")
    assert dead.acquire()
    die(dead)
    assert not StoreLease(PLACE, "b-job.2").acquire()
    assert not StoreLease(PLACE, "a-job").acquire()
    assert retry.acquire()
    assert not StoreLease(PLACE, "a-job.1").acquire()
    retry.release()
