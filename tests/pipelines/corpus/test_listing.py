"""Files of a source: links, odd names, folders that cannot be listed. No file is skipped silently."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moray.pipelines.corpus.corpus_shard import rejects_name, write_corpus_shard
from moray.pipelines.corpus.globs import matches, pattern_error
from moray.pipelines.corpus.source import Source
from moray.pipelines.corpus.step import Corpus, CorpusConfig, corpus_shards
from moray.pipelines.shared.documents import read_shard, shard_name
from moray.platform.core.errors import RecipeError


def keys(root: Path, **fields: Any) -> list[str]:
    return [key for key, _ in Source(name="s", path=root, **fields).files()]


def skipped(root: Path, **fields: Any) -> dict[str, int]:
    return dict(Source(name="s", path=root, **fields).listing().skipped)


def test_the_cache_of_hugging_face_is_read(tmp_path: Path) -> None:
    """Snapshots are folders of links to files that are named by their hash."""
    snapshot = tmp_path / "datasets--x--y" / "snapshots" / "0a1b"
    blobs = tmp_path / "datasets--x--y" / "blobs"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "feed").write_text('{"text": "one"}\n')
    (blobs / "beef").write_text("# readme")
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/feed")
    (snapshot / "README.md").symlink_to("../../blobs/beef")
    assert keys(snapshot, reader="huggingface") == ["data/train.jsonl"]
    assert keys(tmp_path, reader="huggingface") == ["datasets--x--y/snapshots/0a1b/data/train.jsonl"]
    assert skipped(snapshot, reader="huggingface") == {"no data file of a dataset": 1}
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert keys(link, reader="huggingface") == ["data/train.jsonl"]


def test_skipped_files_are_counted_by_reason(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "sub/c.txt", "d.csv", "skip.txt"):
        (root / name).write_text("words")
    (root / "link.txt").symlink_to("a.txt")
    (root / "gone.txt").symlink_to("nowhere")
    (root / "round.txt").symlink_to("round.txt")
    (root / "sub" / "up").symlink_to(root)
    (root / "other").symlink_to(root / "sub")
    os.mkfifo(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "s.txt"))
    fields = {"include": ("**/*.txt",), "exclude": ("skip.*",), "max_files": 4}
    assert keys(root, **fields) == ["a.txt", "b.txt", "link.txt", "round.txt"]
    assert skipped(root, **fields) == {
        "not in `include`": 1,
        "in `exclude`": 1,
        "beyond `max_files`": 1,
        "links that lead nowhere": 1,
        "links to folders, not entered": 2,
        "neither files nor folders": 2,
    }
    summary = Source(name="s", path=root, **fields).listing().summary(expected=False)  # type: ignore[arg-type]
    assert summary.startswith("1 links that lead nowhere (such as gone.txt); 2 links to folders, not entered")
    assert keys(root, include=("other/*.txt",)) == ["other/c.txt"], "entered where a pattern names it"
    assert keys(root, include=("sub/up/sub/*.txt",)) == [], "but not in a loop"


def test_a_name_that_is_no_utf8_is_read_under_a_name_that_is(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in (b"caf\xe9.txt", b"good.txt", "naïve\n#1.txt".encode(), b"\xff\xfe/".rstrip(b"/") + b".txt"):
        (root / os.fsdecode(name)).write_text("A document.")
    (root / os.fsdecode(b"d\xe9")).mkdir()
    (root / os.fsdecode(b"d\xe9") / "x.txt").write_text("Another.")
    config = CorpusConfig(sources=(Source(name="s", path=root),))
    Corpus().check(config, {})
    assert {file.key for file in Corpus().external(config)} == {
        "caf\\xe9.txt",
        "good.txt",
        "naïve\n#1.txt",
        "\\xff\\xfe.txt",
        "d\\xe9/x.txt",
    }
    (shard,) = corpus_shards(config)
    counts = write_corpus_shard(shard, tmp_path / "out", 1000)
    assert counts["documents"] == 5
    assert len(read_shard(tmp_path / "out" / shard_name(0))) == 5


def test_an_odd_name_of_a_file_of_rows_is_read_too(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl.gz")).write_bytes(b'{"text": "one"}')
    config = CorpusConfig(sources=(Source(name="s", path=tmp_path, reader="jsonl"),))
    (shard,) = corpus_shards(config)
    write_corpus_shard(shard, tmp_path / "out", 1000)
    (reject,) = read_shard(tmp_path / "out" / rejects_name(0)).to_pylist()
    assert (reject["key"], reject["reason"]) == ("caf\\xe9.jsonl.gz", "malformed")


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    """A folder that cannot be listed is an error, which `exclude` answers; what cannot be opened is counted."""
    for name in ("open/a.txt", "open/secret.txt", "closed/b.txt", "noenter/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    tmp_path.chmod(0o755)
    for name, mode in (("open/secret.txt", 0), ("closed", 0), ("noenter", 0o444)):
        (tmp_path / name).chmod(mode)
    for parent in tmp_path.parents[:-2]:
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        config = CorpusConfig(sources=(Source(name="s", path=tmp_path),))
        with pytest.raises(
            RecipeError, match=r"sources\.0: source 's': .*closed cannot be listed: Permission"
        ) as found:
            Corpus().check(config, {})
        assert found.value.hint == "grant read access, or add 'closed/**/*' to `exclude`"
        assert keys(tmp_path, exclude=("closed/**/*",)) == ["noenter/d.txt", "open/a.txt", "open/secret.txt"]
        assert keys(tmp_path, include=("open/*.txt", "noenter/*.txt")) == [
            "noenter/d.txt",
            "open/a.txt",
            "open/secret.txt",
        ]
        (shard,) = corpus_shards(CorpusConfig(sources=(Source(name="s", path=tmp_path, exclude=("closed/**/*",)),)))
    finally:
        os.seteuid(0)
    assert len(shard["files"]) == 3


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("**.txt", "did you mean '**/*.txt'?"), ("a**/b", "did you mean '**/a*/b'?"), ("", "'**/*' matches every file"),
     ("/a.txt", "relative to it"), ("../a.txt", "relative to it"), ("~/a", "relative to it"),
     ("docs/", "did you mean 'docs/**/*'?"), ("docs/**", "did you mean 'docs/**/*'?"), (" ", "an empty pattern")],
)  # fmt: skip
def test_an_invalid_pattern_is_refused_with_a_suggestion(pattern: str, hint: str) -> None:
    assert hint in pattern_error(pattern)
    for field in ("include", "exclude"):
        with pytest.raises(ValidationError, match="Value error") as found:
            Source.model_validate({"name": "s", "path": "x", field: [pattern]})
        assert hint in str(found.value)


@pytest.mark.parametrize("key", ["a.txt", "double//slash.txt", "/leading.txt", "a/", "//", "x/./y", "x/../y", " "])
def test_every_key_of_a_bucket_is_a_file(key: str) -> None:
    assert matches(key, "**/*")
    assert not pattern_error("**/*")


def test_the_error_lists_the_skipped_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("{}")
    source = Source(name="s", path=tmp_path, include=("*.txt",))
    with pytest.raises(RecipeError, match=r"skipped: 2 not in `include` \(such as a.json\)"):
        Corpus().check(CorpusConfig(sources=(source,)), {})
