"""Artifacts exist when their manifest does; leases admit one process; events survive torn writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moray.platform.core.atomic import create_bytes
from moray.platform.core.errors import InputError
from moray.platform.core.events import EventLog, EventTail, MetricEvent, NoteEvent, read_events
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.lease import Lease, is_stale
from moray.platform.store.manifest import MANIFEST, Manifest, hash_folder
from moray.platform.store.search import find_artifact


def manifest(step: str = "filter", fingerprint: str = "ab" * 16, **changes: object) -> Manifest:
    values: dict[str, object] = {
        "step": step, "step_version": 1, "fingerprint": fingerprint, "produces": "documents", "config": {},
        "address": {}, "files": [], "bytes": 0, "run": "r", "code": {}, "environment": {}, "started": 1.0,
        "seconds": 2.0, "cpu_seconds": 4.0,
    }  # fmt: skip
    return Manifest.model_validate({**values, **changes})


def test_without_a_manifest_there_is_no_artifact(home: Home) -> None:
    store = ArtifactStore(home)
    folder = store.prepare("filter", "ab" * 16, keep_leftovers=False)
    (folder / "data").write_text("half")
    assert store.get("filter", "ab" * 16) is None
    store.commit(manifest())
    assert store.get("filter", "ab" * 16) is not None


def test_the_first_manifest_wins(home: Home) -> None:
    store = ArtifactStore(home)
    store.prepare("filter", "ab" * 16, keep_leftovers=False)
    assert store.commit(manifest(run="first")).manifest.run == "first"
    assert store.commit(manifest(run="second")).manifest.run == "first"


def test_leftovers_are_cleared_unless_the_step_can_resume(home: Home) -> None:
    store = ArtifactStore(home)
    folder = store.prepare("filter", "ab" * 16, keep_leftovers=False)
    (folder / "left").write_text("over")
    assert (store.prepare("filter", "ab" * 16, keep_leftovers=True) / "left").exists()
    assert not (store.prepare("filter", "ab" * 16, keep_leftovers=False) / "left").exists()


def test_an_artifact_is_found_by_alias_prefix_and_folder(home: Home) -> None:
    store = ArtifactStore(home)
    store.prepare("filter", "ab" * 16, keep_leftovers=False)
    made = store.commit(manifest())
    store.aliases.set("demo", "newest", made.reference)
    for reference in ("demo@newest", "filter/abab", f"filter/{'ab' * 16}", str(made.folder)):
        assert find_artifact(store, reference).reference == made.reference
    with pytest.raises(InputError) as caught:
        find_artifact(store, "demo@newst")
    assert "demo@newest" in caught.value.hint


def test_an_ambiguous_prefix_is_refused(home: Home) -> None:
    store = ArtifactStore(home)
    for fingerprint in ("ab" * 16, "ac" * 16):
        store.prepare("filter", fingerprint, keep_leftovers=False)
        store.commit(manifest(fingerprint=fingerprint))
    with pytest.raises(InputError, match="matches 2 artifacts"):
        find_artifact(store, "filter/a")


def test_hashes_skip_temporary_files_but_not_hidden_ones(tmp_path: Path) -> None:
    for name in ("a.bin", ".metadata", ".a.bin.x1y2", MANIFEST, f"sub/{MANIFEST}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.path for file in hash_folder(tmp_path)] == [".metadata", "a.bin", f"sub/{MANIFEST}"]


def test_create_never_replaces(tmp_path: Path) -> None:
    assert create_bytes(tmp_path / "x", b"one")
    assert not create_bytes(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_lease_is_exclusive_while_its_process_lives(tmp_path: Path) -> None:
    path = tmp_path / ".f.lease"
    code = (
        "import sys, pathlib\n"
        "from moray.platform.store.lease import Lease\n"
        f"assert Lease(pathlib.Path({str(path)!r})).acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rival:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "held\n"
        mine = Lease(path)
        assert not mine.acquire()
        rival.kill()
        rival.wait()
        assert mine.acquire(), "the lease of a killed process must be free at once"
    mine.release()
    assert not path.exists()


def test_waiting_ends_when_the_work_is_done(tmp_path: Path) -> None:
    held, rival = Lease(tmp_path / "l"), Lease(tmp_path / "l")
    assert held.acquire()
    assert not rival.wait(done=lambda: True, cancelled=lambda: False)
    assert not rival.wait(done=lambda: False, cancelled=lambda: True)
    held.release()
    assert rival.wait(done=lambda: False, cancelled=lambda: False)
    rival.release()


def test_a_lease_from_another_host_goes_stale_by_its_heartbeat(tmp_path: Path) -> None:
    path = tmp_path / "l"
    path.write_text(json.dumps({"host": "elsewhere", "boot": "b", "pid": 1, "process_started": "1"}))
    assert not is_stale(path)
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert is_stale(path)


def test_events_are_numbered_per_writer_and_read_in_order(tmp_path: Path) -> None:
    one, two = EventLog(tmp_path / "events", "a"), EventLog(tmp_path / "events", "b")
    for i in range(3):
        one.append(NoteEvent(step="s", level="info", text=str(i)))
        two.append(MetricEvent(step="s", name="train_loss", value=float(i), at=i))
    events = read_events(tmp_path)
    assert [e.sequence for e in events if e.writer == one.writer] == [0, 1, 2]
    assert [e.value for e in events if isinstance(e, MetricEvent)] == [0.0, 1.0, 2.0]
    assert [e.time for e in events] == sorted(e.time for e in events)


def test_a_torn_last_line_is_not_an_event_until_it_is_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events", "a")
    log.append(NoteEvent(step="s", level="info", text="whole"))
    segment = tmp_path / "events" / f"{log.writer}.jsonl"
    tail = EventTail(tmp_path / "events")
    assert len(list(tail.poll())) == 1
    line = segment.read_bytes()
    with segment.open("ab") as file:
        file.write(line[:20])
    assert not list(tail.poll())
    with segment.open("ab") as file:
        file.write(line[20:])
    assert len(list(tail.poll())) == 1


def test_a_metric_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events", "a")
    with pytest.raises(ValueError, match="train_loss"):
        log.append(MetricEvent(step="s", name="train_los", value=1.0))
    assert not read_events(tmp_path)
