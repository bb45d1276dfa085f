"""The builder of the benchmark corpus, on packages made here: no network, and a missing tool is one clear error."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from moray.pipelines.shared.documents import SCHEMA, document_id, shard_paths
from tests.checkout import ROOT

ROOM = ROOT / "benchmarks" / "corpus"


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOM))
    import build

    return build


def record(cache: Path, name: str, origin: str, path: Path) -> None:
    """Says that the cache holds a package, as after a download."""
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    row = {
        "name": name,
        "origin": origin,
        "version": "1",
        "file": path.name,
        "size": path.stat().st_size,
        "sha256": sha,
    }
    (cache / "packages.json").write_text(json.dumps([row]))


def debian_package(cache: Path) -> None:
    tree = cache / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: man\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: d\n"
    )
    pages = tree / "usr/share/man/man1"
    pages.mkdir(parents=True)
    for i in range(3):
        text = f'.\\" a comment\n.TH PAGE{i} 1\n.SH NAME\nword \\- of page {i}, \\fBbold\\fP\n' + "more words\n" * 20
        (pages / f"page{i}.1.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    os.symlink("page0.1.gz", pages / "link.1.gz")
    subprocess.run(["dpkg-deb", "--build", "-Zgzip", str(tree), str(cache / "man_1_all.deb")], check=True)
    shutil.rmtree(tree)
    record(cache, "man", "debian", cache / "man_1_all.deb")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_a_corpus_is_rebuilt_only_if_a_shard_is_missing(builder: ModuleType, tmp_path: Path) -> None:
    debian_package(tmp_path / "cache/debian")
    source = builder.Source("man", "debian", "man", "GPL", r"/man/.*\.gz$", sys.modules["texts"].man_page, "de")
    out = tmp_path / "out"
    manifest = builder.build(out, tmp_path / "cache", [source])
    assert (manifest["documents"], manifest["sources"][0]["license"]) == (3, "GPL")
    (path,) = shard_paths(out)
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    keys = [f"usr/share/man/man1/page{i}.1.gz" for i in range(3)]
    assert table["id"].to_pylist() == [document_id("man", key) for key in keys]
    assert table["text"][1].as_py().startswith("PAGE1 1\nNAME\nword - of page 1, bold\nmore words")
    assert dict(table["meta"][0].as_py()) == {"path": keys[0], "language": "de"}
    before = path.stat().st_mtime_ns
    assert builder.build(out, tmp_path / "cache", [source]) == manifest
    assert path.stat().st_mtime_ns == before, "nothing is written anew"
    path.unlink()
    assert builder.build(out, tmp_path / "cache", [source]) == manifest
    assert path.exists()


@pytest.mark.parametrize(
    ("reader", "data", "expected"),
    [
        ("fortunes", b"one\n%\ntwo\nlines\n%\n", [("#0", "one\n"), ("#1", "two\nlines\n"), ("#2", "")]),
        ("whole", gzip.compress("ä".encode("latin-1"), mtime=0), [("", "ä")]),
        ("pieces", b"x" * 20_001, [("#0", "x" * 20_000), ("#1", "x")]),
    ],
)
def test_each_kind_of_file_gives_its_texts(builder: ModuleType, reader: str, data: bytes, expected: object) -> None:
    assert list(getattr(sys.modules["texts"], reader)(data)) == expected


def test_every_source_is_well_formed(builder: ModuleType) -> None:
    pins = (ROOM / "requirements.txt").read_text()
    assert len({source.name for source in builder.SOURCES}) == len(builder.SOURCES)
    for source in builder.SOURCES:
        assert source.license
        assert source.origin == "debian" or f"{source.package}==" in pins


def test_without_apt_there_is_one_error(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOM / "build.py"), str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: no apt-get: this corpus is built of Debian packages"
    assert not (tmp_path / "out").exists()


def test_a_damaged_package_is_fetched_again(builder: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a-1.whl", "w") as archive:
        archive.writestr("a/x.txt", "text")
    record(tmp_path, "a", "python", tmp_path / "a-1.whl")
    recorded = sys.modules["fetch"]._recorded
    assert list(recorded(tmp_path)) == ["a"]
    (tmp_path / "a-1.whl").write_bytes(b"torn")
    assert recorded(tmp_path) == {}
