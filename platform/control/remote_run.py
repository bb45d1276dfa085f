"""`moray run` on an existing cluster, without a control plane: a controller of one job, for as long as it runs.

If this process is killed, the job goes on, and its artifacts are in the store.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moray.platform.control.controller import Controller
from moray.platform.control.database import Database
from moray.platform.control.jobs import ENDED, Job, Submission
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.core.home import Home
from moray.platform.core.interrupts import until_interrupted

_POLL_SECONDS = 0.5


def run_on_cluster(
    home: Home,
    cluster: ManagedCluster,
    submission: Submission,
    show: Callable[[str], None],
    warn: Callable[[str], None],
) -> Job:
    """Runs a submission on a cluster until it has ended; Ctrl-C stops it. Returns the ended job.

    show: called with new text of the driver's log. warn: called with the reason when the job has to wait.
    """
    with tempfile.TemporaryDirectory(dir=home.root, prefix=".run-") as folder:
        database = Database(Path(folder) / "job.db", durable=False)
        controller = Controller(home, database, cluster, log=lambda text: None)
        thread = threading.Thread(target=controller.run, name="controller", daemon=True)
        try:
            job = controller.jobs.submit(submission)[0]
            thread.start()
            return _follow(controller, job.id, _Log(home, show), warn)
        finally:
            controller.stop()
            thread.join(30)
            database.close()


def _follow(controller: Controller, name: str, log: _Log, warn: Callable[[str], None]) -> Job:
    """Shows the log of the latest attempt until the job has ended. The first Ctrl-C stops the job."""
    said, stopping, lost = "", False, 0
    while True:
        try:
            with until_interrupted():
                job = controller.jobs.get(name)
                log.show(job)
                for attempt in job.attempts[lost:]:
                    if attempt.state in ("lost", "failed") and job.state not in ENDED:
                        warn(f"attempt {attempt.number} {attempt.state}: {attempt.detail}; trying again")
                        lost = attempt.number
                if job.state in ENDED:
                    return job
                reason = next((line for line in controller.why(job) if "unreachable" in line or "waiting" in line), "")
                if reason and reason != said:
                    warn(reason)
                    said = reason
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            if stopping or controller.jobs.get(name).state in ENDED:
                raise
            stopping = True
            warn("stopping the job; Ctrl-C again leaves it running on the cluster")
            controller.jobs.request_stop(name)


class _Log:
    """The driver's log of the latest attempt, as it grows."""

    def __init__(self, home: Home, show: Callable[[str], None]) -> None:
        self._home, self._show = home, show
        self._attempt, self._at = "", 0

    def show(self, job: Job) -> None:
        """Shows the text that was added since the last call."""
        if job.latest is None:
            return
        if job.latest.id != self._attempt:
            self._attempt, self._at = job.latest.id, 0
        path = self._home.runs / self._attempt / "logs" / "driver.txt"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data if job.state in ENDED else data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        if whole:
            self._show(whole.decode(errors="replace"))
