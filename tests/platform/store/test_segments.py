"""Events and logs of a run in a store: nothing is lost, and nothing is doubled, however writer and reader end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.platform.core.events import NoteEvent, read_events
from moray.platform.store.paths import StorePath, bucket_at
from moray.platform.store.segments import SegmentReader, SegmentWriter, event_log
from tests.s3 import BUCKET, Request, faulty_proxy, keys

pytestmark = pytest.mark.s3  # a real S3 server

RUN = StorePath(f"s3://{BUCKET}/root", "runs/r.1")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any) -> Iterator[None]:
    monkeypatch.setenv("MORAY_HOME", str(tmp_path / "host"))
    bucket_at.cache_clear()
    yield
    bucket_at.cache_clear()


def stopped(folder: Path, run: StorePath = RUN) -> SegmentWriter:
    """A writer whose thread does nothing, so that the test decides when it uploads."""
    writer = SegmentWriter(folder, run)
    writer._end.set()
    writer._thread.join()
    return writer


def append(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)


def test_events_of_a_process_on_another_host_arrive(tmp_path: Path) -> None:
    with event_log(RUN / "events", "train-0") as log:
        for number in range(3):
            log.append(NoteEvent(step="pretrain", level="info", text=f"note {number}"))
    SegmentReader(RUN, tmp_path / "mirror").poll()
    assert [event.text for event in read_events(tmp_path / "mirror")] == ["note 0", "note 1", "note 2"]  # type: ignore[union-attr]


def test_an_event_that_is_being_written_waits(tmp_path: Path, s3: Any) -> None:
    writer, reader = stopped(tmp_path / "run"), SegmentReader(RUN, tmp_path / "mirror")
    events = tmp_path / "run" / "events" / "runner-1.jsonl"
    append(events, b'{"a": 1}\n{"b"')
    writer.flush()
    reader.poll()
    assert (tmp_path / "mirror" / "events" / "runner-1.jsonl").read_bytes() == b'{"a": 1}\n'
    append(events, b": 2}\n")
    writer.close()
    reader.poll()
    reader.poll()
    assert (tmp_path / "mirror" / "events" / "runner-1.jsonl").read_bytes() == events.read_bytes()


@settings(max_examples=15)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=30), st.booleans(), st.integers(0, 40)), max_size=8))
def test_a_reader_that_is_killed_anywhere_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bytes, bool, int]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("killed")
    run = StorePath(RUN.root, f"runs/{tmp_path.name}")
    writer, log = stopped(tmp_path / "run", run), tmp_path / "run" / "logs" / "driver.txt"
    copy = tmp_path / "mirror" / "logs" / "driver.txt"
    for data, uploads, cut in steps:
        append(log, data)
        if uploads:
            writer.flush()
            SegmentReader(run, tmp_path / "mirror").poll()
            with copy.open("ab") as file:  # as a reader that was killed while it wrote
                file.truncate(min(cut, copy.stat().st_size))
    writer.flush()
    SegmentReader(run, tmp_path / "mirror").poll()
    assert (copy.read_bytes() if copy.exists() else b"") == (log.read_bytes() if log.exists() else b"")


def test_an_outage_delays_and_loses_nothing(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = [True]

    def fault(request: Request) -> Any:
        return (403, "<Error><Code>AccessDenied</Code></Error>") if down[0] and request.method == "PUT" else "pass"

    with faulty_proxy(s3_url, fault) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        bucket_at.cache_clear()
        writer = stopped(tmp_path / "run")
        append(tmp_path / "run" / "logs" / "driver.txt", b"one")
        writer._end.clear()
        with pytest.raises(Exception, match="access denied"):
            writer.flush()
        down[0] = False
        append(tmp_path / "run" / "logs" / "driver.txt", b"two")
        writer.flush()
        SegmentReader(RUN, tmp_path / "mirror").poll()
    assert (tmp_path / "mirror" / "logs" / "driver.txt").read_bytes() == b"onetwo"


def test_a_long_log_is_not_listed_from_its_beginning(tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moray.platform.store import segments

    monkeypatch.setattr(segments, "_LARGEST", 10)
    writer, log = stopped(tmp_path / "run"), tmp_path / "run" / "logs" / "driver.txt"
    for number in range(12):
        append(log, f"line {number:02d}\n".encode())
        writer.flush()
        SegmentReader(RUN, tmp_path / "mirror").poll()
        assert (tmp_path / "mirror" / "logs" / "driver.txt").read_bytes() == log.read_bytes()
    assert len(keys(s3, "root/runs/r.1/logs")) == 12


def test_a_driver_uploads_its_own_files_and_not_those_it_brings(tmp_path: Path, s3: Any) -> None:
    """Both are in its run folder, where it follows the events of workers on other hosts."""
    run = tmp_path / "run"
    writer, reader = stopped(run), SegmentReader(RUN, run)
    append(run / "logs" / "driver.txt", b"one\n")
    writer.flush()
    with event_log(RUN / "events", "train-0") as log:
        log.append(NoteEvent(step="pretrain", level="info", text="from a worker"))
    reader.poll()
    stored = {key: s3.head_object(Bucket=BUCKET, Key=key)["LastModified"] for key in keys(s3, "root/runs/r.1/events")}
    append(run / "logs" / "driver.txt", b"two\n")
    (worker,) = (run / "events").iterdir()
    append(worker, b'{"half": 1}\n')  # must not be uploaded from here
    writer.flush()
    SegmentReader(RUN, tmp_path / "mirror").poll()
    assert (tmp_path / "mirror" / "logs" / "driver.txt").read_bytes() == b"one\ntwo\n"
    assert stored.keys() == set(keys(s3, "root/runs/r.1/events"))
