"""Connects a run to an existing Ray cluster; used by the driver of a submitted job.

This module neither starts nor stops Ray. `exclusive` locks resources that a cluster has only once (Ray Serve).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moray.cluster.machine import job_config, prepare_environment, quiet_logging, signal_handlers_kept
from moray.cluster.pending import PendingWatcher
from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import Cancelled
from moray.platform.core.home import Home
from moray.platform.store.lease import Lease
from moray.platform.store.paths import StorePath
from moray.platform.store.store_lease import StoreLease


class AttachedCluster(Cluster):
    """Connects this process to the cluster at `address`. Copies Ray's log files of this job to `logs`."""

    def __init__(
        self, home: Home, address: str, logs: Path, topology: Topology, stored: StorePath | None = None
    ) -> None:
        """stored: where processes on different hosts find each other's leases, if they share no disk."""
        self._home = home
        self._stored = stored
        self.shares_files = stored is None
        self._address = address
        self._topology = topology
        self._job = ""
        self._session: Path | None = None
        self._pending = PendingWatcher(self.report_pending)
        self.logs = logs

    def topology(self) -> Topology:
        return self._topology

    def ensure(self) -> Topology:
        if self._session is not None:
            return self._topology
        prepare_environment(self._home)
        import ray

        assert self.logs is not None
        quiet_logging(self.logs / "driver.log")
        with signal_handlers_kept():
            context: Any = ray.init(
                address=self._address, log_to_driver=False, logging_level=logging.ERROR, job_config=job_config()
            )
        self._session = Path(context.address_info["session_dir"])
        self._job = ray.get_runtime_context().get_job_id()
        self._pending.start()
        return self._topology

    def stop(self) -> None:
        if self._session is None:
            return
        import ray

        self._pending.stop()
        self._keep_logs()
        with signal_handlers_kept():
            ray.shutdown()
        self._session = None

    @contextlib.contextmanager
    def exclusive(self, name: str, cancelled: Callable[[], bool]) -> Iterator[None]:
        cluster = self._cluster_id()
        lease = (
            StoreLease(self._stored / cluster / name)
            if self._stored
            else Lease(self._local_leases / f"{name}-{cluster}.lease")
        )
        while not lease.acquire():
            if cancelled():
                raise Cancelled
            time.sleep(0.5)
        try:
            yield
        finally:
            lease.release()

    def _cluster_id(self) -> str:
        """The cluster's address, which is the same for all of its drivers, whatever their users call it."""
        import ray

        return str(ray.get_runtime_context().gcs_address).replace(":", "-")

    @property
    def _local_leases(self) -> Path:
        folder = self._home.shared_folder
        return folder / "leases" if folder else self._home.up

    def _keep_logs(self) -> None:
        """Copies the output of this job's workers; their file names contain the job's id."""
        assert self._session is not None
        assert self.logs is not None
        for file in (self._session / "logs").glob(f"worker-*-{self._job}-*"):
            with contextlib.suppress(OSError):  # on another machine, or rotated in the meantime
                if file.stat().st_size:
                    self.logs.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, self.logs / file.name)
