"""Curves as W&B's own client stores them, in its offline mode."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from moray.platform.core.events import MetricEvent
from moray.platform.core.home import Home
from moray.platform.plan.tracking import Tracking, WandbTracking
from moray.platform.run.wandb_sink import WandbSink
from tests.platform.run.test_tracker import STEP, Curve, run_curve, warnings

pytestmark = pytest.mark.heavy


def stored(folder: Path) -> list[dict[str, float]]:
    """The rows of all runs in the folder, in order. The values of W&B's own keys, such as times, are left out."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # waits for the process that writes the files
    rows: list[dict[str, float]] = []
    for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                row = {key: value for key, value in items.items() if not key.startswith("_")}
                if rows and rows[-1]["step"] == row["step"] and len(rows[-1].keys() & row.keys()) == 1:
                    rows[-1] |= row  # a flush came between the values of a step
                else:
                    rows.append(row)
    return rows


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B, which is a log of LevelDB of less than a block, with a header of seven bytes."""
    assert data[:4] == b":W&B"
    assert len(data) < 1 << 15
    at = 7
    while at < len(data):
        _, size, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "a whole record"
        yield data[at + 7 : at + 7 + size]
        at += 7 + size


def test_a_resumed_run_continues_the_curves(home: Home, tmp_path: Path) -> None:
    tracking = Tracking.model_validate({"wandb": {"project": "p", "mode": "offline", "folder": tmp_path / "wandb"}})
    assert warnings(run_curve(home, tracking, Curve(range(1, 5), fails=True))) == []
    assert warnings(run_curve(home, tracking, Curve(range(3, 8)))) == []
    assert stored(tmp_path / "wandb") == [
        {"train_loss": 10.0 - at, "train_expert_load/layer-3": 1.0, "step": at} for at in range(1, 8)
    ]
    runs = list((tmp_path / "wandb" / "wandb").glob("offline-run-*"))
    assert len({path.name.rpartition("-")[2] for path in runs}) == 1, "both have the id of the step"


def test_values_that_come_late_have_their_step(tmp_path: Path) -> None:
    sink = WandbSink(WandbTracking(project="p", mode="offline"), tmp_path)
    values = [("train_loss", 1), ("train_loss", 2), ("train_checkpoint_seconds", 1), ("train_loss", 2)]
    for name, at in values:
        sink.write(STEP, MetricEvent(step="pretrain", name=name, value=float(at), at=at))
    sink.flush()
    sink.close()
    assert stored(tmp_path) == [
        {"train_loss": 1.0, "step": 1},
        {"train_loss": 2.0, "step": 2},
        {"train_checkpoint_seconds": 1.0, "step": 1},
    ]
