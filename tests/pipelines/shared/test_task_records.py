"""A task is done once its record is there, and not before."""

from __future__ import annotations

from pathlib import Path

import pytest

from moray.pipelines.shared.shards import Row
from moray.pipelines.shared.task_records import forget_records, recorded


def test_a_task_that_is_recorded_is_not_done_again(tmp_path: Path) -> None:
    done = []

    def make() -> Row:
        done.append(1)
        return {"shard": 3, "kept": 2, "cells": "[]"}

    rows = [recorded(tmp_path, "documents-00003", make) for _ in range(3)]
    assert rows == [{"shard": 3, "kept": 2, "cells": "[]"}] * 3
    assert [list(row) for row in rows] == [["shard", "kept", "cells"]] * 3, "columns stay in their order"
    assert len(done) == 1
    recorded(tmp_path, "documents-00004", make)
    forget_records(tmp_path)
    assert not list(tmp_path.iterdir())
    recorded(tmp_path, "documents-00003", make)
    assert len(done) == 3


def test_a_task_that_fails_leaves_no_record(tmp_path: Path) -> None:
    def fail() -> Row:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        recorded(tmp_path, "documents-00003", fail)
    assert recorded(tmp_path, "documents-00003", lambda: {"shard": 3}) == {"shard": 3}
