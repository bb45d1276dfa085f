"""An embedded Ray: started for one run on this machine, ended with it.

Always our own: `ray.init()` without an address attaches to any cluster it finds on the box. Without Ray's dashboard,
which nobody watches for so short a time, and which takes a second to start; token authentication is Ray's default for
local clusters, what Ray prints goes to files, and the processes die with this one even after SIGKILL (Ray ties them to
their parent).
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
    cores,
    gpus,
    holds_sockets,
    job_config,
    memory_bytes,
    prepare_environment,
    quiet_logging,
    signal_handlers_kept,
)
from moray.cluster.pending import PendingWatcher
from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.store.lease import is_alive


class EmbeddedCluster(Cluster):
    """Ray inside this process's lifetime. What it has to say goes to a folder of its own under `home.logs`."""

    fixed = True

    def __init__(self, home: Home, cpus: int | None = None) -> None:
        self._home = home
        self._cpus = cpus
        self._folder: Path | None = None
        self._watcher = PendingWatcher(self.say_pending)

    def topology(self) -> Topology:
        return Topology(self._cpus or cores(), gpus(), memory_bytes())

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
        with signal_handlers_kept():
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
        ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _temporary_folder(self) -> Path:
        """A folder named after this process; those of processes that are gone are cleared away."""
        parent = self._home.root / "ray"
        if not holds_sockets(parent):
            return Path(tempfile.mkdtemp(prefix="moray-"))
        parent.mkdir(exist_ok=True)
        for old in parent.glob("r*"):
            if old.name[1:].isdigit() and not is_alive(int(old.name[1:])):
                shutil.rmtree(old, ignore_errors=True)
        folder = parent / f"r{os.getpid()}"
        folder.mkdir()
        return folder


def _end_log_monitor() -> None:
    """Ends the process that sends what workers print to drivers, which this driver does not want (`log_to_driver`). It
    looks at all logs ten times a second: a hundredth of a core, and `ray.init` has no setting for it."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(Path(part).name == "log_monitor.py" for part in child.cmdline()):
                child.terminate()


def _keep_logs(folder: Path, target: Path) -> None:
    """Copies Ray's text logs of this session, so that an error can be looked into after the cluster is gone."""
    source = folder / "session_latest" / "logs"
    if source.is_dir():
        with contextlib.suppress(OSError):  # a full disk: it has its own error, and Ray must be stopped all the same
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock", "old"))
