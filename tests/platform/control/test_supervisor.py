"""The supervisor survives errors, adopts living services and restarts hung ones. With real processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moray.platform.control import supervisor as module
from moray.platform.control.supervisor import Service, Supervisor, end_services, read_state, supervisors
from moray.platform.core.home import Home
from moray.platform.core.processes import Process, marked

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
NAMES = ("one", "two")


def wait_for(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline, "it did not come to be"
        threading.Event().wait(0.02)


@contextmanager
def running(home: Home, *services: Service, say: Callable[[str], None] = lambda text: None) -> Iterator[Supervisor]:
    made = Supervisor(home, services, say)
    assert made.acquire()
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join()
        assert [process for name in NAMES for process in marked(home.root, name)] == []


def service(name: str, ready: Callable[[], bool] = lambda: True, **more: object) -> Service:
    return Service(name, SLEEP, {}, ready, **more)  # type: ignore[arg-type]


def test_whatever_one_service_raises_the_others_live_on(home: Home) -> None:
    def raising() -> bool:
        raise ConnectionError("another program on the port")

    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    with running(home, service("one", prepare=raising), service("two"), say=full) as made:
        wait_for(lambda: made.status["two"].state == "running")
        assert made.status["one"].pid is None
    with running(home, service("one", raising), service("two"), say=full) as made:
        wait_for(lambda: made.status["two"].state == "running")
        assert made.status["one"].state == "starting"


def test_a_state_that_cannot_be_written_is_written_later(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with_state = running(home, service("one"), say=said.append)
        made = with_state.__enter__()
        wait_for(lambda: made.status["one"].state == "running")
        assert read_state(home) == {}
    wait_for(lambda: read_state(home).get("one"))
    assert [text for text in said if "cannot write state.json" in text][1:] == [], "said once"
    with_state.__exit__(None, None, None)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"one": 1}'])
def test_running_services_are_adopted_for_any_content_of_the_state_file(home: Home, content: str | None) -> None:
    first = Supervisor(home, [service("one")], lambda text: None)
    assert first.acquire()
    first._check(first._services[0])
    pid = first.status["one"].pid
    assert first._lock is not None
    first._lock.close()  # as when it was killed
    if content is not None:
        (home.up / "state.json").write_text(content)
    with running(home, service("one")) as second:
        assert second.status["one"].pid == pid
        wait_for(lambda: second.status["one"].state == "running")
        assert supervisors(home) == [Process.of(os.getpid())]
        assert not Supervisor(home, [], print).acquire(), "one at a time"
    assert supervisors(home) == []


def test_a_hung_service_is_restarted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process is alive but does not answer."""
    monkeypatch.setattr(module, "_PROBE_SECONDS", 0.02)

    def answers() -> bool:
        (process,) = marked(home.root, "one")
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"

    with running(home, service("one", answers=answers, hang_seconds=0.5), service("two")) as made:
        wait_for(lambda: made.status["one"].state == "running")
        before, other = made.status["one"].pid, made.status["two"].pid
        assert before is not None
        os.kill(before, signal.SIGSTOP)
        wait_for(lambda: made.status["one"].pid not in (None, before) and made.status["one"].state == "running")
        assert "no answer for" in made.status["one"].detail
        assert made.status["two"].pid == other


def test_services_end_without_a_supervisor(home: Home) -> None:
    made = Supervisor(home, [service("one")], lambda text: None)
    assert made.acquire()
    made._check(made._services[0])
    (home.up / "state.json").unlink()
    assert marked(home.root, "one")
    end_services(home, NAMES)
    assert marked(home.root, "one") == []
