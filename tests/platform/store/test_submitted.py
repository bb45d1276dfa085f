"""The submitter's files in a store: by content, once, and the same on every host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moray.pipelines.corpus.step import CorpusConfig, corpus_shards
from moray.pipelines.corpus.step import step as corpus
from moray.platform.core.errors import InputError
from moray.platform.core.references import resolve
from moray.platform.plan import recipe as _recipe  # noqa: F401 (it knows how to bring files)
from moray.platform.store.submitted import bring_tree, files_below, read_tree, total_size, upload_tree


def silent(phase: str, done: float, total: float) -> None:
    """Ignores progress."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MORAY_HOME", str(tmp_path / "host"))
    return tmp_path / "host"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("the same words\n")
    (folder / "deep" / "b.txt").write_text("the same words\n")
    (folder / "c.jsonl").write_text('{"text": "a row"}\n')
    return folder


def test_contents_are_stored_once_and_come_back(tmp_path: Path, text: Path, host: Path) -> None:
    said: list[tuple[str, float, float]] = []
    tree = upload_tree(tmp_path / "store", files_below(text), lambda *one: said.append(one))
    assert said[-1] == ("uploading", 48.0, 48.0)
    assert total_size([files_below(text)]) == 48
    (text / "c.jsonl").unlink()
    found = read_tree(str(tree))
    assert [(file.key, file.size) for file in found] == [("a.txt", 15), ("c.jsonl", 18), ("deep/b.txt", 15)]
    assert found[0].sha256 == found[2].sha256
    brought = bring_tree(str(tree))
    assert sorted(files_below(brought)) == ["a.txt", "c.jsonl", "deep/b.txt"]
    assert (brought / "c.jsonl").read_text() == '{"text": "a row"}\n'
    assert resolve(f"store:{tree}") == str(brought)


def test_one_file_comes_back_as_a_file(tmp_path: Path, text: Path, host: Path) -> None:
    tree = upload_tree(tmp_path / "store", files_below(text / "a.txt"), silent)
    assert bring_tree(str(tree)).read_text() == "the same words\n"


def test_a_tree_that_is_gone_is_one_error(tmp_path: Path, host: Path) -> None:
    with pytest.raises(InputError, match="no longer exists"):
        read_tree(str(tmp_path / "store" / ".sources" / "trees" / "x.json"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: Path) -> None:
    files = files_below(text)
    (text / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.txt: No such file"):
        upload_tree(tmp_path / "store", files, silent)


def test_a_submitted_source_is_the_same_source(tmp_path: Path, text: Path) -> None:
    """Its files have the same keys, order, sizes and digests, so its artifact has the same fingerprint."""
    given: dict[str, Any] = {
        "sources": [
            {"name": "text", "path": str(text), "include": ["**/*.txt"]},
            {"name": "rows", "path": str(text / "c.jsonl"), "reader": "jsonl"},
            {"name": "mine", "path": "host:/mnt/everywhere"},
        ]
    }
    here = CorpusConfig.model_validate(given)
    fields = corpus.submitted(here, lambda files: str(upload_tree(tmp_path / "store", files, silent)))
    assert sorted(fields) == ["sources.0.submitted", "sources.1.submitted"]
    given["sources"].pop()
    here = CorpusConfig.model_validate(given)
    for number, source in enumerate(given["sources"]):
        source |= {"path": "/not/on/this/host", "submitted": fields[f"sources.{number}.submitted"]}
    there = CorpusConfig.model_validate(given)
    assert corpus.external(there) == corpus.external(here)
    keys = [[shard["keys"] for shard in corpus_shards(config)] for config in (here, there)]
    assert keys[0] == keys[1] == [["a.txt", "deep/b.txt"], ["c.jsonl"]]


def test_a_file_that_changes_during_the_upload_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new contents must not get the name of the old ones: everybody else would read them."""
    source = tmp_path / "a.txt"
    source.write_text("before")

    def progress(phase: str, done: float, total: float) -> None:
        if phase == "hashing":
            source.write_text("later!")

    with pytest.raises(InputError, match=r"a\.txt changed while it was uploaded"):
        upload_tree(tmp_path / "store", {"a.txt": source}, progress)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.suffix == ".txt"]
