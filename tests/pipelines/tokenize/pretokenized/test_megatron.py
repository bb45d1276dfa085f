"""Megatron's indexed datasets: every type, any bounds, and files that do not fit together."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.corpus.source_file import File
from moray.pipelines.tokenize.pretokenized import megatron
from moray.pipelines.tokenize.pretokenized.megatron import MegatronFiles, open_megatron
from moray.platform.core.errors import InputError
from tests.pipelines.tokenize.pretokenized.id_files import CODES, Documents, write_megatron

DOCUMENTS = [[[5, 6, 7], [8]], [], [[9, 10]], [[]], [[11], [], [12, 13]]]
IDS = [[5, 6, 7, 8], [], [9, 10], [], [11, 12, 13]]


def pair(prefix: Path) -> tuple[File, File]:
    paths = (f"{prefix}.idx", f"{prefix}.bin")
    index, data = (File(path, os.path.getsize(path)) for path in paths)
    return index, data


def opened(prefix: Path) -> MegatronFiles:
    return open_megatron(*pair(prefix))


def read(files: MegatronFiles, first: int, last: int) -> dict[int, list[int]]:
    return {
        stored.first + n: stored.ids[stored.bounds[n] : stored.bounds[n + 1]].tolist()
        for stored in files.read(first, last)
        for n in range(len(stored.bounds) - 1)
    }


@pytest.mark.parametrize("dtype", CODES)
def test_every_type_is_read(tmp_path: Path, dtype: str) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS, dtype)
    files = opened(tmp_path / "a")
    assert (files.documents, files.sequences, files.tokens) == (5, 7, 9)
    assert read(files, 0, 5) == dict(enumerate(IDS))
    assert next(files.read(0, 1)).ids.dtype == np.dtype(dtype)


@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=4), max_size=12),
    cut=st.integers(0, 12),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 5), st.integers(1, 5)),
)
def test_any_range_of_documents_has_their_ids(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Documents], cut: int, sizes: tuple[int, int, int]
) -> None:
    folder = tmp_path_factory.mktemp("megatron")
    write_megatron(folder / "a", documents, "uint8")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("READ_BYTES", "_DOCUMENTS", "_SEQUENCES"), sizes, strict=True):
            patch.setattr(megatron, name, size)
        files, cut = opened(folder / "a"), min(cut, len(documents))
        found = read(files, 0, cut) | read(files, cut, len(documents))
    assert found == {n: [i for sequence in document for i in sequence] for n, document in enumerate(documents)}


def test_a_pair_without_documents(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [])
    assert opened(tmp_path / "a").documents == 0


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    data = tmp_path / "a.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=r"a\.bin has 16 bytes, but .*a\.idx describes 18: it is truncated"):
        opened(tmp_path / "a")
    data.write_bytes(whole + b"\0\0")
    with pytest.raises(InputError, match="it belongs to another index"):
        opened(tmp_path / "a")
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"a\.idx has \d+ bytes, but its header requires"):
        opened(tmp_path / "a")
    index.write_bytes(b"MM")
    with pytest.raises(InputError, match="less than its header"):
        opened(tmp_path / "a")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"NOTMAGIC\0", r"is no index of Megatron-LM: it begins with b'NOTMAGIC"),
        (0, b"TNTIDX\0\0\1", "has the old format of fairseq"),
        (9, b"\2", "version 2 is unknown"),
        (17, b"\x09", "type code 9 is unknown"),
        (34, b"\7", "sequence 1 of 1 ids is at byte 6, not 14"),
        (-8, b"\6", "its documents have the sequences 0 to 6; there are 7"),
        (-16, b"\1", "the bounds of the documents 0 to 4 are not in order"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    at %= len(index)
    index[at : at + len(value)] = value
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(InputError, match=message):
        read(opened(tmp_path / "a"), 0, 5)


def test_modes_of_sequences_are_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    with (tmp_path / "a.idx").open("ab") as file:
        file.write(bytes(7))
    with pytest.raises(InputError, match="as multimodal data") as error:
        opened(tmp_path / "a")
    assert error.value.hint == "only text is supported"


def test_a_document_without_an_end_in_sight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    monkeypatch.setattr(megatron, "LARGEST_DOCUMENT", 3)
    with pytest.raises(InputError, match="document 0 has 4 ids; the most is 3"):
        read(opened(tmp_path / "a"), 0, 5)
