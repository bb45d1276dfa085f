"""Files by address: the same code on a disk and in a real S3 server, and the cache that hosts keep."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moray.pipelines.shared.arrays import array_part, load_array, mapped, save_array
from moray.pipelines.shared.grouped_file import read_group, write_groups
from moray.pipelines.shared.task_records import forget_records, recorded
from moray.platform.core.errors import InputError, StoreUnreachableError
from moray.platform.core.home import Home
from moray.platform.store import bucket, file_cache
from moray.platform.store.file_cache import FileCache
from moray.platform.store.manifest import FileEntry, hash_file
from moray.platform.store.paths import (
    AnyPath,
    StorePath,
    any_path,
    bucket_at,
    cache,
    entries_below,
    file_size,
    list_files,
    list_folders,
    local_file,
    local_folder,
    new_file,
    open_ranges,
    read_range,
    remove_folder,
    write_file,
)
from tests.checkout import ROOT
from tests.s3 import BUCKET, Fault, Request, faulty_proxy, keys

pytestmark = pytest.mark.s3  # a real S3 server

STORE = f"s3://{BUCKET}/root"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process as a host with a cache of its own."""
    monkeypatch.setenv("MORAY_HOME", str(tmp_path / "host"))
    monkeypatch.setenv("MORAY_ARTIFACTS", STORE)
    bucket_at.cache_clear()
    yield tmp_path / "host"
    bucket_at.cache_clear()


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, s3: Any, tmp_path: Path) -> AnyPath:
    return tmp_path / "out" if request.param == "disk" else any_path(f"{STORE}/step/w-1")


@pytest.fixture
def counted(s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Request]]:
    """The requests that reach the server."""
    seen: list[Request] = []

    def note(request: Request) -> str:
        seen.append(request)
        return "pass"

    with faulty_proxy(s3_url, note) as url, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        bucket_at.cache_clear()
        yield seen
        bucket_at.cache_clear()


def reads(seen: list[Request], key: str) -> int:
    return sum(request.method == "GET" and request.key.endswith(key) for request in seen)


def test_a_file_is_written_whole_and_read_in_every_way(folder: AnyPath) -> None:
    path = folder / "part" / "a.bin"
    assert not path.exists()
    write_file(path, bytes(range(200)))
    assert path.exists()
    assert any_path(str(path)) == path
    assert path.read_bytes() == bytes(range(200))
    assert file_size(path) == 200
    assert read_range(path, 10, 13) == bytes([10, 11, 12])
    assert read_range(path, 10, 10) == b""
    with local_file(path) as local:
        assert local.read_bytes() == bytes(range(200))
    with open_ranges(path) as file:
        file.seek(-5, io.SEEK_END)
        assert file.read(9) == bytes(range(195, 200))
    with pytest.raises(FileNotFoundError):
        (folder / "missing").read_bytes()


def test_a_block_that_raises_writes_nothing(folder: AnyPath) -> None:
    def write_half() -> None:
        with new_file(folder / "a") as temporary:
            temporary.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert not (folder / "a").exists()


def test_files_and_folders_are_listed_by_name(folder: AnyPath) -> None:
    for name in ("b-1.npy", "b-2.npy", "c-1.npy", "below/b-3.npy", ".hidden"):
        write_file(folder / name, name.encode())
    assert list_files(folder, "b-*.npy") == {"b-1.npy": 7, "b-2.npy": 7}
    assert list(list_files(folder)) == [".hidden", "b-1.npy", "b-2.npy", "c-1.npy"]
    assert list_folders(folder) == ["below"]
    assert list_files(folder / "nothing") == {}
    remove_folder(folder / "below")
    remove_folder(folder / "nothing")
    assert list_files(folder / "below") == {}
    (folder / "b-1.npy").unlink()
    (folder / "b-1.npy").unlink(missing_ok=True)
    assert list(list_files(folder, "b-*")) == ["b-2.npy"]


def test_arrays_and_groups_are_read_in_parts(folder: AnyPath) -> None:
    values = np.arange(60, dtype=np.uint32).reshape(3, 20)
    save_array(folder / "values.npy", values)
    assert (load_array(folder / "values.npy") == values).all()
    assert (mapped(folder / "values.npy")[1] == values[1]).all()
    for row, part in ((0, slice(0, 20)), (2, slice(3, 9)), (1, slice(5, 5))):
        assert (array_part(folder / "values.npy", np.uint32, (3, 20), row, part) == values[row, part]).all()
    write_groups(folder / "groups.arrow", pa.table({"n": list(range(6))}), np.array([2, 0, 2, 5, 0, 2]))
    found = [read_group(folder / "groups.arrow", group) for group in (0, 1, 2, 5)]
    assert [batch and batch["n"].to_pylist() for batch in found] == [[1, 4], None, [0, 2, 5], [3]]


def test_a_recorded_task_runs_once(folder: AnyPath) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"shard": 3}

    assert [recorded(folder, "task", make) for _ in range(2)] == [{"shard": 3}] * 2
    assert len(made) == 1
    forget_records(folder)
    recorded(folder, "task", make)
    assert len(made) == 2


def test_a_folder_is_brought_to_the_host_and_forgotten(folder: AnyPath, host: Path) -> None:
    write_file(folder / "model" / "config.json", b"{}")
    write_file(folder / "model" / "deep" / "weights", b"w" * 100)
    with local_folder(folder / "model") as local:
        assert (local / "config.json").read_bytes() == b"{}"
        assert (local / "deep" / "weights").read_bytes() == b"w" * 100
    if isinstance(folder, StorePath):
        assert not local.exists()
        assert not list((host / "cache" / "files" / ".tmp").iterdir())
        with pytest.raises(InputError, match="has no files"), local_folder(folder / "nothing"):
            pass


def test_the_manifest_gets_sizes_and_hashes_without_reading(s3: Any, counted: list[Request], tmp_path: Path) -> None:
    folder = StorePath(STORE, "step/w-1")
    write_file(folder / "a", b"alpha")
    write_file(folder / "below" / "b", b"beta" * 1000)
    (tmp_path / "b").write_bytes(b"beta" * 1000)
    found = entries_below(folder)
    assert [(entry.path, entry.size) for entry in found] == [("a", 5), ("below/b", 4000)]
    assert found[1].sha256 == hash_file(tmp_path / "b")
    assert not reads(counted, "/a") + reads(counted, "/b")
    (folder / "plain").write_bytes(b"written without its hash")
    plain = next(entry for entry in entries_below(folder) if entry.path == "plain")
    assert plain == FileEntry(path="plain", size=24, sha256=plain.sha256)
    assert reads(counted, "/plain") == 1


def test_however_many_readers_ask_an_object_is_downloaded_once(s3: Any, counted: list[Request]) -> None:
    path = StorePath(STORE, "step/w-1/documents-00000.parquet")
    write_file(path, os.urandom(100_000))
    ready = threading.Barrier(8)

    def read(_: int) -> bytes:
        ready.wait()
        with local_file(path) as local:
            return local.read_bytes()

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(read, range(8)))) == 1
    assert reads(counted, path.name) == 1
    code = (
        f"from moray.platform.store.paths import *\nwith local_file(any_path({str(path)!r})) as f: len(f.read_bytes())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert reads(counted, path.name) == 1


def test_a_large_object_comes_in_parts(s3: Any, counted: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_cache, "_PART", 1000)
    path, data = StorePath(STORE, "big"), os.urandom(4321)
    write_file(path, data)
    with local_file(path) as local:
        assert local.read_bytes() == data
    assert reads(counted, "big") == 5


def test_the_least_recently_used_copies_leave_and_none_that_is_in_use(
    s3: Any, monkeypatch: pytest.MonkeyPatch, host: Path
) -> None:
    monkeypatch.setenv("MORAY_CACHE_BYTES", "3600")
    paths = [StorePath(STORE, f"file-{n}") for n in range(5)]
    for path in paths:
        write_file(path, path.name.encode() * 160)  # 960 bytes

    def kept() -> list[str]:
        return sorted(path.read_bytes()[:6].decode() for path in (host / "cache" / "files").glob("??/*"))

    with local_file(paths[0]) as used:
        for moment, path in enumerate(paths[1:3]):
            with local_file(path) as local:
                pass
            os.utime(local, (moment, moment))
        os.utime(used, (-1, -1))  # the oldest
        with local_file(paths[3]):
            assert kept() == ["file-0", "file-2", "file-3"]
        mapping = np.memmap(used, np.uint8, "r")
    os.utime(used, (0, 0))
    with local_file(paths[4]):
        assert "file-0" not in kept()
    assert bytes(mapping[:6]) == b"file-0"  # a map outlives its file
    assert int((host / "cache" / "files" / ".size").read_text()) <= 3600


def test_a_file_larger_than_the_cache_is_read_all_the_same(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_CACHE_BYTES", "10")
    path = StorePath(STORE, "larger")
    write_file(path, b"x" * 1000)
    for _ in range(2):
        with local_file(path) as local:
            assert len(local.read_bytes()) == 1000


def test_an_object_that_is_replaced_is_another_file(s3: Any) -> None:
    path = StorePath(STORE, "changing")
    for data in (b"before", b"after"):
        write_file(path, data)
        with local_file(path) as local:
            assert local.read_bytes() == data


def test_an_object_that_is_replaced_during_its_download_is_an_error(
    s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = StorePath(STORE, "changing")
    write_file(path, b"before")

    def replace(request: Request) -> str:
        if request.method == "GET" and request.key.endswith("changing"):
            s3.put_object(Bucket=BUCKET, Key="root/changing", Body=b"after")
        return "pass"

    with faulty_proxy(s3_url, replace) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        bucket_at.cache_clear()
        with pytest.raises(InputError, match="was replaced while it was being read"), local_file(path):
            pass
    assert not list(cache().root.glob("??/*"))


KILLED = """
import os, sys
from pathlib import Path
from moray.platform.store.file_cache import FileCache
with FileCache(Path(sys.argv[1]), 1000).folder() as folder:
    (folder / "part").write_bytes(b"half a download")
    os._exit(1)
"""


def test_leftovers_of_killed_processes_are_removed_and_those_of_other_hosts_stay(host: Path) -> None:
    root = host / "cache" / "files"
    subprocess.run([sys.executable, "-c", KILLED, str(root)], check=False, cwd=ROOT)
    (left,) = (root / ".tmp").iterdir()
    theirs = left.with_name(left.name.replace(left.name[:8], "0" * 8))
    theirs.mkdir()
    with FileCache(root, 1000).temporary() as temporary:
        assert temporary.exists()
    assert not left.exists()
    assert theirs.exists()


def test_a_write_that_is_short_on_a_full_disk_leaves_no_copy(
    s3: Any, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux writes what fits and returns its length; only the next write would fail."""
    path = StorePath(STORE, "large")
    write_file(path, b"x" * 1000)
    monkeypatch.setattr(os, "pwrite", lambda file, data, begin: 300)
    with pytest.raises(InputError, match="not enough disk space"), local_file(path):
        pass
    assert not list(cache().root.glob("??/*"))


def test_requests_are_repeated_for_longer_than_botocore_would(
    s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore gives up after some 35 failures of a client, however long it has been told to try."""
    write_file(StorePath(STORE, "kept"), b"data")
    left = [150]

    def refuse(request: Request) -> str:
        left[0] -= 1
        return "drop" if left[0] >= 0 else "pass"

    with faulty_proxy(s3_url, refuse) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setattr(bucket, "_LONGEST_WAIT", 0.2)
        bucket_at.cache_clear()
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: StorePath(STORE, "kept").read_bytes(), range(8)))
    assert found == [b"data"] * 8
    bucket_at.cache_clear()


def test_an_outage_is_longer_than_the_patience(s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(s3_url, lambda request: "drop") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setattr(bucket, "PATIENCE", 0.5)
        bucket_at.cache_clear()
        with pytest.raises(StoreUnreachableError, match="the server does not respond"):
            StorePath(STORE, "any").read_bytes()
    bucket_at.cache_clear()


@pytest.mark.parametrize("text", ["ten", "-5", "10XB"])
def test_a_wrong_limit_is_one_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_CACHE_BYTES", text)
    with pytest.raises(InputError, match=f"MORAY_CACHE_BYTES: invalid size {text!r}"):
        _ = Home.from_environment().cache_bytes


def test_a_failing_upload_names_the_object(
    s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch, through: Callable[[Fault], AbstractContextManager[None]]
) -> None:
    def refuse(request: Request) -> Any:
        return (403, "<Error><Code>AccessDenied</Code></Error>") if request.method == "PUT" else "pass"

    with through(refuse), pytest.raises(InputError, match="step/out/a: access denied"):
        write_file(StorePath(STORE, "step/out/a"), b"1")
    assert not keys(s3, "root/step/out")


@pytest.fixture
def through(s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], Any]:
    """What Moray asks within the block passes a proxy with these faults."""
    from contextlib import contextmanager

    @contextmanager
    def within(fault: Fault) -> Iterator[None]:
        with faulty_proxy(s3_url, fault) as url, monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            bucket_at.cache_clear()
            yield

    return within
