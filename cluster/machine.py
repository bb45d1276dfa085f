"""This machine's resources, and the environment, log handlers and signal handlers for processes that use Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moray.cluster.numba_cache import numba_cache
from moray.platform.core.home import Home
from moray.platform.core.processes import module_folders

# Unix socket paths are limited to 107 bytes; Ray appends about 75 bytes to its folder.
LONGEST_FOLDER = 30
# Of Ray Serve's processes: the gateway in the proxies; a proxy that died is noticed within a second; replicas report
# their tokens in flight every two seconds; requests go to replicas by gRPC, which takes a quarter less time for each
# event of a stream than calls of actors do.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "moray.pipelines.serve.gateway.middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
}


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


def job_config() -> Any:
    """Job config for `ray.init` that keeps the current folder off the workers' module path. A user's `queue.py` there
    would be imported instead of the standard library's.

    Ray adds the current folder to the path of all workers, except for client jobs. The setting has no other effect on a
    job without its own files (`ray/_private/worker.py`, `connect`).
    """
    from ray.job_config import JobConfig

    return JobConfig(_client_job=True)


def prepare_environment(home: Home) -> None:
    """Sets PYTHONPATH, and the other variables of `ray_environment` that are not set yet, in this process."""
    settings = ray_environment(home)
    os.environ["PYTHONPATH"] = settings.pop("PYTHONPATH")
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def ray_environment(home: Home) -> dict[str, str]:
    """Returns the environment variables for Ray and the processes it starts."""
    import moray

    checkout = str(Path(moray.__path__[0]))
    search = module_folders()
    if checkout not in search and (Path(checkout) / "moray.py").exists():
        search.insert(0, checkout)
    return {
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONSAFEPATH": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray_data_logging.yaml")),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_task_oom_retries": "5",  # of a task killed for lack of memory; unlimited by default
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TORCH_FR_BUFFER_SIZE": "2000",
        # gloo would connect each rank with all others: 2,047 sockets. Its collectives use a few of them.
        "TORCH_GLOO_LAZY_INIT": "1",
        "NUMBA_CACHE_DIR": str(numba_cache(home.cache / "numba")),
        "TRITON_CACHE_DIR": str(home.cache / "triton"),
        "HF_HUB_OFFLINE": "1",
        **SERVE_ENVIRONMENT,
    }


def set_up_worker() -> None:
    """Runs at the start of every worker of a job on an existing cluster, whose hosts were not set up by Moray."""
    home = Home.from_environment()
    for name, value in ray_environment(home).items():
        if name != "PYTHONPATH":
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restores the handlers of SIGINT and SIGTERM on exit; Ray installs a SIGTERM handler that exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def usable_by_ray(folder: Path) -> bool:
    """Whether Ray can use a folder: the path is short enough for Unix sockets and has no characters, such as spaces or
    quotes, that break the command lines Ray builds."""
    return len(os.fsencode(folder)) <= LONGEST_FOLDER and bool(re.fullmatch(r"[\w./-]+", str(folder), re.ASCII))


def gpus() -> int:
    """The number of visible NVIDIA devices, counted without importing torch (which takes seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").exists() else 0
    if visible is not None:
        return min(present, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    return present


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
