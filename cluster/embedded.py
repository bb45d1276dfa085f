"""An embedded Ray: started for one run on this machine, ended with it.

Always our own: `ray.init()` without an address attaches to any cluster it finds on the box. The dashboard listens on
loopback only, token authentication is Ray's default for local clusters, what Ray prints goes to files, and the
processes die with this one even after SIGKILL (Ray ties them to their parent).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moray.platform.errors import InputError
from moray.platform.home import Home
from moray.platform.lease import is_alive
from moray.platform.step import Cluster, Topology

# A Unix socket's path may have 107 bytes; Ray appends about 75 to its folder's.
_LONGEST_FOLDER = 30


class EmbeddedCluster(Cluster):
    """Ray inside this process's lifetime. What it has to say goes to a folder of its own under `home.logs`."""

    def __init__(self, home: Home, cpus: int | None = None) -> None:
        self._home = home
        self._cpus = cpus
        self._folder: Path | None = None
        self.dashboard = ""

    def topology(self) -> Topology:
        return Topology(self._cpus or _cores(), _gpus(), _memory_bytes())

    def ensure(self) -> Topology:
        topology = self.topology()
        if self._folder is not None:
            return topology
        _prepare_environment(self._home)
        import ray

        if ray.is_initialized():
            raise InputError("this process is already connected to a Ray cluster", "call ray.shutdown() first")
        self._folder = self._temporary_folder()
        self.logs = self._home.logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        quiet_logging(self.logs / "driver.log")
        with _signal_handlers_kept():
            context: Any = ray.init(
                address="local",
                num_cpus=topology.cpus,
                num_gpus=topology.gpus,
                object_store_memory=max(128 << 20, min(1 << 30, topology.memory_bytes // 8)),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=free_port(),
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self._folder),
            )
        self.dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        return topology

    def stop(self) -> None:
        if self._folder is None:
            return
        import ray

        assert self.logs is not None
        _keep_logs(self._folder, self.logs)
        ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _temporary_folder(self) -> Path:
        """A folder named after this process; those of processes that are gone are cleared away."""
        parent = self._home.root / "ray"
        if len(str(parent)) > _LONGEST_FOLDER:
            return Path(tempfile.mkdtemp(prefix="moray-"))
        parent.mkdir(exist_ok=True)
        for old in parent.glob("r*"):
            if old.name[1:].isdigit() and not is_alive(int(old.name[1:])):
                shutil.rmtree(old, ignore_errors=True)
        folder = parent / f"r{os.getpid()}"
        folder.mkdir()
        return folder


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_logging(log: Path) -> None:
    """Sends the log records of Ray and its libraries to `log` instead of the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("ray", "ray.data", "ray.serve", "ray.train", "ray.tune", "py.warnings"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.propagate = False
    logging.captureWarnings(True)


def _prepare_environment(home: Home) -> None:
    """Settings that Ray reads from the environment, also in the processes it starts."""
    import moray

    checkout = str(Path(moray.__path__[0]))
    search = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if checkout not in search and (Path(checkout) / "moray.py").exists():
        os.environ["PYTHONPATH"] = os.pathsep.join([checkout, *search])
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray_data_logging.yaml")),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "NUMBA_CACHE_DIR": str(home.cache / "numba"),
        "TRITON_CACHE_DIR": str(home.cache / "triton"),
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray puts handlers of its own under SIGTERM, which exit at once; this puts back what was there before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _keep_logs(folder: Path, target: Path) -> None:
    """Copies Ray's text logs of this session, so that an error can be looked into after the cluster is gone."""
    source = folder / "session_latest" / "logs"
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock", "old"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    """NVIDIA devices, counted without importing torch (which takes seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").exists() else 0
    if visible is not None:
        return min(present, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    return present


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
