"""Sources in a bucket, on a real S3 server: the same documents as from a folder, and no mixing of versions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moray.pipelines.corpus.corpus_shard import write_corpus_shard
from moray.pipelines.corpus.source import Source
from moray.pipelines.corpus.step import Corpus, CorpusConfig, corpus_shards
from moray.pipelines.shared.documents import read_shard, shard_name
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.store.paths import bucket_at
from tests.pipelines.corpus.archives import PAGE, response, zipped
from tests.s3 import BUCKET


@pytest.fixture(autouse=True)
def no_clients_of_other_tests() -> Iterator[None]:
    bucket_at.cache_clear()
    yield
    bucket_at.cache_clear()


def fill(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    table = pa.table({"text": [f"row {i} " * 50 for i in range(20_000)], "n": list(range(20_000))})
    pq.write_table(table, folder / "sub/rows.parquet", row_group_size=3000, compression="none")
    lines = "\n".join(json.dumps({"text": f"line {i}"}) for i in range(3000))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.warc.gz").write_bytes(zipped(response(PAGE.format(name=str(i)).encode(), i) for i in range(30)))
    (folder / "plain.txt").write_text("text")
    (folder / "skip.txt").write_text("not this")


def upload(s3: Any, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/sub/", Body=b"")  # what stands for a folder


def documents(out: Path, **fields: Any) -> list[dict[str, Any]]:
    shards = corpus_shards(CorpusConfig(sources=(Source(name="s", **fields),)))
    for shard in shards:
        write_corpus_shard(shard, out, 100_000)
    return [row for shard in shards for row in read_shard(out / shard_name(shard["shard"])).to_pylist()]


@pytest.mark.parametrize(
    ("reader", "include", "count"),
    [
        ("parquet", "**/*.parquet", 20_000),
        ("jsonl", "*.jsonl.gz", 3000),
        ("warc", "*.warc.gz", 30),
        ("text", "*.txt", 1),
    ],
)
def test_a_bucket_and_a_folder_give_the_same_documents(
    s3: Any, tmp_path: Path, reader: str, include: str, count: int
) -> None:
    fill(tmp_path / "data")
    upload(s3, tmp_path / "data", "some/where")
    fields = {"reader": reader, "include": (include,), "exclude": ("skip.*",)}
    local = documents(tmp_path / "local", path=tmp_path / "data", **fields)
    assert len(local) == count
    assert documents(tmp_path / "remote", url=f"s3://{BUCKET}/some/where", **fields) == local


def test_an_object_is_known_by_its_etag_and_read_in_that_version_only(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="d/a.txt", Body=b"first")
    config = CorpusConfig(sources=(Source(name="s", url=f"s3://{BUCKET}/d/a.txt"),))
    (known,) = Corpus().external(config)
    etag = s3.head_object(Bucket=BUCKET, Key="d/a.txt")["ETag"]
    assert (known.source, known.key, known.size, known.digest) == ("s", "a.txt", 5, f"etag:{etag}")
    (shard,) = corpus_shards(config)
    s3.put_object(Bucket=BUCKET, Key="d/a.txt", Body=b"other")
    with pytest.raises(InputError, match="was replaced while it was being read"):
        write_corpus_shard(shard, tmp_path, 1000)
    assert not list(tmp_path.iterdir())
    assert Corpus().external(config) != [known]
    s3.delete_object(Bucket=BUCKET, Key="d/a.txt")
    with pytest.raises(InputError, match=r"d/a\.txt"):
        write_corpus_shard(shard, tmp_path, 1000)


@pytest.mark.parametrize(
    ("reader", "name"), [("parquet", "sub/rows.parquet"), ("warc", "a.warc.gz"), ("jsonl", "lines.jsonl.gz")]
)
def test_an_outage_is_no_bad_file(s3: Any, tmp_path: Path, reader: str, name: str) -> None:
    """What is gone or replaced half-way ends the task, through whatever library was reading."""
    fill(tmp_path / "data")
    upload(s3, tmp_path / "data", "d")
    (shard,) = corpus_shards(
        CorpusConfig(sources=(Source(name="s", url=f"s3://{BUCKET}/d", reader=reader, include=(name,)),))
    )
    s3.delete_object(Bucket=BUCKET, Key=f"d/{name}")
    with pytest.raises(InputError, match="is missing"):
        write_corpus_shard(shard, tmp_path / "out", 1000)


def test_a_missing_bucket_or_object_is_one_error(s3: Any) -> None:
    def error(**fields: Any) -> RecipeError:
        with pytest.raises(RecipeError) as caught:
            Corpus().check(CorpusConfig(sources=(Source(name="s", **fields),)), {})
        return caught.value

    s3.put_object(Bucket=BUCKET, Key="d/a.txt", Body=b"x")
    assert "no file matches ['**/*'] in s3://" in error(url=f"s3://{BUCKET}/nothing").message
    assert error(url=f"s3://{BUCKET}/d", include=("*.gz",)).hint == "correct `include` or `url`"
    assert "s3://no-such-bucket/x: the bucket does not exist" in error(url="s3://no-such-bucket/x").message
