"""An embedded Ray cluster, started for one run on this machine and stopped with it.

It is always a new cluster: `ray.init()` without an address would attach to any cluster on the machine. Ray's dashboard
is disabled, because it takes a second to start. Token authentication is Ray's default for local clusters. Ray's output
goes to files, and its processes end with this one even after SIGKILL (Ray ties them to their parent).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from moray.cluster.machine import (
    gpus,
    job_config,
    memory_bytes,
    prepare_environment,
    quiet_logging,
    signal_handlers_kept,
    usable_by_ray,
)
from moray.cluster.pending import PendingWatcher
from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.core.interrupts import interrupts_deferred
from moray.platform.core.processes import usable_cores
from moray.platform.store.lease import is_alive


class EmbeddedCluster(Cluster):
    """A Ray cluster with the lifetime of this process. Its logs go to a folder under `home.logs`."""

    fixed = True

    def __init__(self, home: Home, cpus: int | None = None) -> None:
        if cpus is not None and cpus < 1:
            raise InputError(f"--cpus {cpus}", "use at least 1, or leave it out for all cores")
        self._home = home
        self._cpus = cpus
        self._folder: Path | None = None
        self._watcher = PendingWatcher(self.report_pending)

    def topology(self) -> Topology:
        return Topology(self._cpus or usable_cores(), gpus(), memory_bytes())

    def ensure(self) -> Topology:
        topology = self.topology()
        if self._folder is not None:
            return topology
        prepare_environment(self._home)
        import ray

        if ray.is_initialized():
            raise InputError("this process is already connected to a Ray cluster", "call ray.shutdown() first")
        self._folder = self._temporary_folder()
        self.logs = self._home.logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        quiet_logging(self.logs / "driver.log")
        with interrupts_deferred(), signal_handlers_kept():
            ray.init(
                address="local",
                num_cpus=topology.cpus,
                num_gpus=topology.gpus,
                object_store_memory=max(128 << 20, min(1 << 30, topology.memory_bytes // 8)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=job_config(),
                _temp_dir=str(self._folder),
            )
        _end_log_monitor()
        self._watcher.start()
        return topology

    def stop(self) -> None:
        if self._folder is None:
            return
        import ray

        assert self.logs is not None
        self._watcher.stop()
        _keep_logs(self._folder, self.logs)
        with interrupts_deferred():
            ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _temporary_folder(self) -> Path:
        """Creates a folder named after this process, and removes those of processes that have ended."""
        parent = self._home.root / "ray"
        if not usable_by_ray(parent):
            return Path(tempfile.mkdtemp(prefix="moray-"))
        parent.mkdir(exist_ok=True)
        for old in parent.glob("r*"):
            if old.name[1:].isdigit() and not is_alive(int(old.name[1:])):
                shutil.rmtree(old, ignore_errors=True)
        folder = parent / f"r{os.getpid()}"
        folder.mkdir()
        return folder


def _end_log_monitor() -> None:
    """Ends Ray's log monitor, which forwards worker output to drivers; this driver disables that (`log_to_driver`). The
    monitor polls all logs ten times a second (1 % of a core), and `ray.init` has no setting to disable it."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(Path(part).name == "log_monitor.py" for part in child.cmdline()):
                child.terminate()


def _keep_logs(folder: Path, target: Path) -> None:
    """Copies Ray's text logs of this session, so that errors can be investigated after the cluster has stopped."""
    source = folder / "session_latest" / "logs"
    if source.is_dir():
        with contextlib.suppress(OSError):  # a full disk is reported elsewhere, and Ray must still be stopped
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock", "old"))
