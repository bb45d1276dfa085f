"""Files in an attempt's run folder: the order for its driver, its outcome, and the driver's lease.

The controller writes `attempt.json`. The driver writes `outcome.json`; if the driver has died, the controller writes
it. Both files outlive the cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moray.platform.core.atomic import create_bytes
from moray.platform.store.lease import Lease


class AttemptOrder(BaseModel):
    """`attempt.json`: the recipe to run and the resources to run it on.

    ordered: seconds on the monotonic clock of the boot identified by `boot`.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    path: str
    folder: str
    overrides: tuple[str, ...]
    address: str
    cpus: int
    gpus: int
    memory_bytes: int
    ordered: float
    boot: str


class Outcome(BaseModel):
    """`outcome.json`: the final state of an attempt. `again`: whether a retry could succeed."""

    model_config = ConfigDict(frozen=True)

    state: Literal["succeeded", "failed", "cancelled"]
    detail: str = ""
    again: bool = True


def lease_of(run: Path) -> Lease:
    """The lease that the driver holds while it is alive."""
    return Lease(run / "driver.lease")


def read_outcome(run: Path) -> Outcome | None:
    """The outcome of the attempt in this folder; None if none is recorded yet."""
    try:
        return Outcome.model_validate_json((run / "outcome.json").read_bytes())
    except FileNotFoundError:
        return None


def record_outcome(run: Path, outcome: Outcome) -> bool:
    """Records the outcome of an attempt; returns False if one is already recorded.

    The first record wins, whether the driver or the controller writes it. An attempt that the controller has declared
    lost can therefore not start or succeed later.
    """
    return create_bytes(run / "outcome.json", outcome.model_dump_json(indent=2).encode() + b"\n")


def read_order(run: Path) -> AttemptOrder | None:
    """The order for the attempt in this folder; None if none is written yet."""
    try:
        return AttemptOrder.model_validate_json((run / "attempt.json").read_bytes())
    except FileNotFoundError:
        return None
