"""The phases of dedup use only the files that PHASES declares, and read only files of earlier phases."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from moray.pipelines.dedup.phase_files import _NAMES, FileKind, PhaseFiles
from moray.pipelines.dedup.phases import PHASES


def test_every_kind_of_file_is_written_before_it_is_read() -> None:
    written: set[FileKind] = set()
    for phase in PHASES:
        assert phase.reads <= written, phase.run.__name__
        written |= phase.writes
    assert written == set(get_args(FileKind)) == set(_NAMES)


def test_a_file_that_the_phase_does_not_declare_is_refused(tmp_path: Path) -> None:
    files = PhaseFiles(tmp_path, frozenset({"pairs"}), frozenset({"numbers"}))
    assert files.read("pairs", 3) == tmp_path / "pairs-000003.npy"
    assert files.write("numbers") == files.read("numbers") == tmp_path / "numbers.npy"
    with pytest.raises(ValueError, match="this phase does not write pairs"):
        files.write("pairs", 3)
    with pytest.raises(ValueError, match="this phase does not read groups"):
        files.read("groups")
