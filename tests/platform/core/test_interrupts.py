"""Signals: turned into KeyboardInterrupt, or kept until native code has returned."""

from __future__ import annotations

import signal

import pytest

from moray.platform.core.interrupts import interrupts_deferred, until_interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number: int) -> None:
    done = []

    def work() -> None:
        with until_interrupted(), interrupts_deferred():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("block")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["block"]


def test_handlers_are_those_of_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_deferred():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
