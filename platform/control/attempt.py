"""An attempt's run folder: what its driver is asked to do, how it ended, and the lease that shows that it lives.

`attempt.json` is written by the controller, `outcome.json` by the driver, or by the controller for a driver that is
gone; both outlive the cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moray.platform.core.atomic import create_bytes
from moray.platform.store.lease import Lease


class AttemptOrder(BaseModel):
    """`attempt.json`: what to run, and on what. `ordered`: seconds of the monotonic clock, which `boot` began."""

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
    """`outcome.json`: how an attempt ended, in its own words. `again`: whether another try could end otherwise."""

    model_config = ConfigDict(frozen=True)

    state: Literal["succeeded", "failed", "cancelled"]
    detail: str = ""
    again: bool = True


def lease_of(run: Path) -> Lease:
    """Held by the driver while it lives."""
    return Lease(run / "driver.lease")


def read_outcome(run: Path) -> Outcome | None:
    """How the attempt in this folder ended; None while it has not said so."""
    try:
        return Outcome.model_validate_json((run / "outcome.json").read_bytes())
    except FileNotFoundError:
        return None


def end_with(run: Path, outcome: Outcome) -> bool:
    """Says how an attempt ended; False if that has been said. The first word counts, the driver's or the controller's:
    an attempt that was given up cannot begin, or succeed, later.
    """
    return create_bytes(run / "outcome.json", outcome.model_dump_json(indent=2).encode() + b"\n")


def read_order(run: Path) -> AttemptOrder | None:
    """What the attempt in this folder was asked to do; None if it has not been asked yet."""
    try:
        return AttemptOrder.model_validate_json((run / "attempt.json").read_bytes())
    except FileNotFoundError:
        return None
