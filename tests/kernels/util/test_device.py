"""The queue of the CPU: a thread."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref

import pytest
import torch

from moray.kernels.util.device import runtime
from tests.checkout import ROOT

CPU = torch.device("cpu")


def test_work_runs_in_order_without_autograd_and_is_then_forgotten() -> None:
    queue, order, ready = runtime(CPU).queue(), [], threading.Event()
    x = torch.ones(2, requires_grad=True)

    def first() -> torch.Tensor:
        ready.wait(60)
        order.append(1)
        return x * 2

    def second() -> torch.Tensor:
        order.append(2)
        return x * 3

    works = [queue.start(first), queue.start(second)]
    assert not works[0].is_completed()
    held = weakref.ref(first)
    del first
    ready.set()
    assert [work.wait().tolist() for work in works] == [[2, 2], [3, 3]]
    assert not works[1].wait().requires_grad
    assert works[1].is_completed()
    assert order == [1, 2]
    assert held() is None


def test_no_work_runs_after_an_error() -> None:
    queue, ran = runtime(CPU).queue(), []

    def fails() -> torch.Tensor:
        raise ConnectionError("a peer is gone")

    works = [queue.start(fails), queue.start(lambda: ran.append(1) or torch.zeros(1))]
    for work in works:
        with pytest.raises(ConnectionError, match="a peer is gone"):
            work.wait()
    assert ran == []


def test_a_process_ends_while_its_work_waits() -> None:
    program = (
        "import threading, torch; from moray.kernels.util.device import runtime; "
        "queue = runtime(torch.device('cpu')).queue(); queue.start(threading.Event().wait); raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, check=False).returncode == 3
