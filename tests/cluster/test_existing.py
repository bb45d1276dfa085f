"""What answers at the address of a profile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest

from moray.cluster.existing import ExistingJobs
from moray.platform.api import why_absent
from moray.platform.control.profiles import Profile
from moray.platform.core.errors import InputError
from moray.platform.core.ports import free_port


def profile(port: int) -> Profile:
    return Profile(kind="existing", address=f"http://127.0.0.1:{port}", store="/store")


@contextmanager
def answering(answers: dict[str, object]) -> Iterator[int]:
    """The port of a server with these JSON answers by path; others are 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body = json.dumps(answers.get(path)).encode()
            self.send_response(200 if path in answers else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def test_another_version_of_ray_is_an_error() -> None:
    with answering({"/api/version": {"ray_version": "2.9.0"}}) as port:
        with pytest.raises(InputError, match=r"Ray 2\.9\.0 on the cluster") as caught:
            why_absent(profile(port))
        assert f"install ray=={version('ray')}" in caught.value.hint


def test_another_program_is_an_error() -> None:
    with answering({}) as port, pytest.raises(InputError, match="another program answers there"):
        why_absent(profile(port))


def test_an_absent_cluster_is_a_reason_to_wait() -> None:
    assert "does not respond" in why_absent(profile(free_port()))


def test_use_and_demands_come_from_the_autoscaler_and_a_host_that_came_back_is_alive() -> None:
    def node(name: str, address: str, state: str) -> dict[str, object]:
        resources = {"CPU": 4.0, "memory": 8e9}
        return {
            "node_id": name,
            "node_ip": address,
            "state": state,
            "is_head_node": name == "h",
            "resources_total": resources,
        }

    nodes = [node("h", "10.0.0.1", "ALIVE"), node("a", "10.0.0.2", "DEAD"), node("b", "10.0.0.2", "ALIVE")]
    nodes.append(node("c", "10.0.0.3", "DEAD"))
    load = {"usageByNode": {"b": {"CPU": [3.0, 4.0]}}, "resourceDemand": [[{"CPU": 2.0}, 5]]}
    answers = {
        "/api/v0/nodes": {"data": {"result": {"result": nodes}}},
        "/api/cluster_status": {"data": {"clusterStatus": {"loadMetricsReport": load}}},
    }
    with answering(answers) as port:
        found = ExistingJobs(profile(port)).usage()
    assert (found.nodes, found.dead_nodes, found.cpus, found.cpus_used) == (2, 1, 8.0, 3.0)
    assert [(host.address, host.alive, host.cpus_used) for host in found.hosts] == [
        ("10.0.0.1", True, 0.0),
        ("10.0.0.2", True, 3.0),
        ("10.0.0.3", False, 0.0),
    ]
    assert found.waiting == ("5 x 2 CPU",)
