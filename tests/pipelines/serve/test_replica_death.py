"""A replica dies under load: `benchmarks/serving_faults.py` measures how long others wait."""

from __future__ import annotations

from typing import Any

import psutil

from moray.pipelines.serve.session import open_session
from moray.platform.core.ports import free_port
from moray.platform.core.serve_options import ServeOptions
from tests.control_plane import wait_for
from tests.serving_load import Load


def replicas(name: str) -> list[psutil.Process]:
    """The processes of a model's replicas, on this machine."""
    titles = ((process, " ".join(process.info["cmdline"] or [])) for process in psutil.process_iter(["cmdline"]))
    return [process for process, title in titles if "ServeReplica" in title and name in title]


def test_answers_that_had_sent_nothing_come_from_another_replica(ray_cluster: Any, folder: Any) -> None:
    session = open_session(folder, "mortal", "127.0.0.1", free_port(), ServeOptions(replicas=2))
    try:
        first = {process.pid for process in replicas("mortal")}
        assert len(first) == 2
        with Load(f"{session.url}/v1", "mortal", clients=6, tokens=200) as load:
            load.wait_for_more()
            psutil.Process(min(first)).kill()
            load.wait_for_more(20)
            wait_for(lambda: len({one.pid for one in replicas("mortal")} - {min(first)}) == 2, "it is replaced")
            load.wait_for_more(20)
        assert not load.errors, load.errors  # without retries of the client's own
        assert not load.counts["truncated"]
        assert all("the replica stopped during this response" in error for error in load.cut_errors), load.cut_errors
    finally:
        session.stop()
