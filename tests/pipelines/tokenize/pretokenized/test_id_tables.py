"""Lists of ids in Parquet and Arrow files, of every list type, and files without them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moray.pipelines.corpus.source_file import File
from moray.pipelines.tokenize.pretokenized import id_tables
from moray.pipelines.tokenize.pretokenized.id_tables import (
    check_arrow,
    read_arrow_ids,
    read_row_groups,
    row_group_tokens,
)
from moray.pipelines.tokenize.pretokenized.stored_ids import StoredIds
from moray.platform.core.errors import InputError
from tests.pipelines.tokenize.pretokenized.id_files import write_parquet_ids, write_saved_dataset

DOCUMENTS = [[n, *range(n % 5)] for n in range(20)]


def file(path: Path) -> File:
    return File(str(path), path.stat().st_size)


def by_number(found: list[StoredIds]) -> dict[int, list[int]]:
    return {
        stored.first + n: stored.ids[stored.bounds[n] : stored.bounds[n + 1]].tolist()
        for stored in found
        for n in range(len(stored.bounds) - 1)
    }


@pytest.mark.parametrize("read_bytes", [8, 100, 1 << 20])
def test_rows_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
    monkeypatch.setattr(id_tables, "READ_BYTES", read_bytes)
    write_parquet_ids(tmp_path / "a.parquet", DOCUMENTS)
    one = file(tmp_path / "a.parquet")
    assert row_group_tokens(one, "input_ids") == [sum(map(len, DOCUMENTS[at : at + 7])) for at in (0, 7, 14)]
    found = by_number([*read_row_groups(one, "input_ids", 0, 2), *read_row_groups(one, "input_ids", 2, 3)])
    assert found == dict(enumerate(DOCUMENTS))
    write_saved_dataset(tmp_path / "saved", DOCUMENTS, files=1)
    stream = file(tmp_path / "saved" / "data-00000-of-00001.arrow")
    assert by_number(list(read_arrow_ids(stream, "input_ids"))) == dict(enumerate(DOCUMENTS))


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.uint16()), pa.list_(pa.int32(), 3), pa.list_(pa.uint8())]
)
@pytest.mark.parametrize("format_", ["parquet", "stream", "file"])
def test_every_list_type_is_read(tmp_path: Path, kind: pa.DataType, format_: str) -> None:
    # Arrow cannot read missing lists of a fixed size from Parquet.
    rows = [[1, 2, 3], [7, 8, 9] if pa.types.is_fixed_size_list(kind) else None, [4, 5, 6]]
    table = pa.table({"tokens": pa.array(rows, kind)})
    path = tmp_path / "a"
    if format_ == "parquet":
        pq.write_table(table, path)
        found = list(read_row_groups(file(path), "tokens", 0, 1))
    else:
        new = pa.ipc.new_stream if format_ == "stream" else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
        found = list(read_arrow_ids(file(path), "tokens"))
    assert by_number(found) == {n: ids or [] for n, ids in enumerate(rows)}


def test_files_without_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"input_id": [[1]], "text": ["a"], "scores": [[0.5]]}), path)
    with pytest.raises(InputError, match=r"a\.parquet has no column 'input_ids'") as error:
        row_group_tokens(file(path), "input_ids")
    assert "input_id" in error.value.hint
    for column, kind in (("text", "string"), ("scores", "list<element: double>")):
        with pytest.raises(InputError, match=f"{column!r} is {kind}, not a list of integers"):
            row_group_tokens(file(path), column)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        row_group_tokens(file(path), "input_ids")
    (tmp_path / "b.arrow").write_bytes(b"")
    with pytest.raises(InputError, match=r"b\.arrow cannot be read"):
        check_arrow(file(tmp_path / "b.arrow"), "input_ids")


def test_a_truncated_stream_and_a_missing_id_are_refused(tmp_path: Path) -> None:
    write_saved_dataset(tmp_path, DOCUMENTS, files=1)
    path = tmp_path / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"arrow cannot be read"):
        list(read_arrow_ids(file(path), "input_ids"))
    write_parquet_ids(tmp_path / "a.parquet", [[1], [2, None]])  # type: ignore[list-item]
    with pytest.raises(InputError, match="document 1, position 1: the id is missing"):
        list(read_row_groups(file(tmp_path / "a.parquet"), "input_ids", 0, 1))
