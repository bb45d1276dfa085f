"""Files of an attempt: the order for its driver, its outcome, the driver's lease, events and logs.

The controller writes the order, `attempt.json`. The driver writes `outcome.json`; if the driver has died, the
controller writes it. They are in the attempt's run folder, if the driver sees this machine's disk (`LocalFiles`), or in
the store (`StoredFiles`). They outlive the cluster.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from moray.platform.core.atomic import create_bytes, write_text
from moray.platform.store.lease import Lease, is_stale
from moray.platform.store.paths import StorePath
from moray.platform.store.segments import SegmentReader
from moray.platform.store.store_lease import LeaseWatch, StoreLease

_ORDER, _OUTCOME, _LEASES = "attempt.json", "outcome.json", "driver"


class AttemptOrder(BaseModel):
    """`attempt.json`: the recipe to run and the resources to run it on.

    ordered: seconds on the monotonic clock of the boot identified by `boot`. address: of Ray, for drivers on this
    machine.
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
    cluster: str = "local"


class Outcome(BaseModel):
    """`outcome.json`: the final state of an attempt. `again`: whether a retry could succeed."""

    model_config = ConfigDict(frozen=True)

    state: Literal["succeeded", "failed", "cancelled"]
    detail: str = ""
    again: bool = True


class AttemptFiles(Protocol):
    """The files of one attempt."""

    def write_order(self, order: AttemptOrder) -> None:
        """Writes the order, before the driver is submitted."""

    def read_order(self) -> AttemptOrder | None:
        """The order; None if none is written yet."""

    def lease(self) -> Lease | StoreLease:
        """The lease that the driver holds while it is alive. A second driver of the attempt cannot acquire it."""

    def is_alive(self) -> bool:
        """Whether the driver holds its lease, as far as this process has observed."""

    def read_outcome(self) -> Outcome | None:
        """The outcome; None if none is recorded yet."""

    def record_outcome(self, outcome: Outcome) -> bool:
        """Records the outcome; returns False if one is already recorded.

        The first record wins, whether the driver or the controller writes it. An attempt that the controller has
        declared lost can therefore not start or succeed later.
        """

    def bring(self) -> None:
        """Brings new events and logs to the run folder on this machine."""


class LocalFiles:
    """The files of an attempt in its run folder, which driver and controller both see."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def write_order(self, order: AttemptOrder) -> None:
        write_text(self._run / _ORDER, order.model_dump_json(indent=2) + "\n")

    def read_order(self) -> AttemptOrder | None:
        try:
            return AttemptOrder.model_validate_json((self._run / _ORDER).read_bytes())
        except FileNotFoundError:
            return None

    def lease(self) -> Lease:
        return Lease(self._run / f"{_LEASES}.lease")

    def is_alive(self) -> bool:
        return not is_stale(self.lease().path)

    def read_outcome(self) -> Outcome | None:
        try:
            return Outcome.model_validate_json((self._run / _OUTCOME).read_bytes())
        except FileNotFoundError:
            return None

    def record_outcome(self, outcome: Outcome) -> bool:
        return create_bytes(self._run / _OUTCOME, _encoded(outcome))

    def bring(self) -> None:
        """Does nothing: they are there."""


class StoredFiles:
    """The files of an attempt in the store. `run`: the run folder on this machine, which gets copies.

    Raises InputError while the store does not respond.
    """

    def __init__(self, stored: StorePath, run: Path) -> None:
        self._stored, self._local = stored, LocalFiles(run)
        self._watch = LeaseWatch(stored / _LEASES)
        self._segments = SegmentReader(stored, run)

    def write_order(self, order: AttemptOrder) -> None:
        self._local.write_order(order)
        (self._stored / _ORDER).write_text(order.model_dump_json(indent=2) + "\n")

    def read_order(self) -> AttemptOrder | None:
        if (known := self._local.read_order()) is not None:
            return known
        try:
            return AttemptOrder.model_validate_json((self._stored / _ORDER).read_bytes())
        except FileNotFoundError:
            return None

    def lease(self) -> StoreLease:
        return StoreLease(self._stored / _LEASES)

    def is_alive(self) -> bool:
        return self._watch.number() > 0 and not self._watch.is_stale()

    def read_outcome(self) -> Outcome | None:
        if (known := self._local.read_outcome()) is not None:
            return known
        try:
            found = Outcome.model_validate_json((self._stored / _OUTCOME).read_bytes())
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # only a copy: this machine's disk may be full
            self._local.record_outcome(found)
        return found

    def record_outcome(self, outcome: Outcome) -> bool:
        created = self._stored.bucket.create((self._stored / _OUTCOME).key, _encoded(outcome))
        # If the response to a successful request was lost, the outcome that exists is this one.
        return created or self.read_outcome() == outcome

    def bring(self) -> None:
        self._segments.poll()


def _encoded(outcome: Outcome) -> bytes:
    return outcome.model_dump_json(indent=2).encode() + b"\n"
