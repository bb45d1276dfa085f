"""Choosing free ports and checking given ones."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moray.platform.core import ports
from moray.platform.core.errors import InputError
from moray.platform.core.ports import check_port, free_port, free_ports, is_free


def test_a_taken_port_is_named_and_a_free_one_hinted():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use") as refused:
            check_port("127.0.0.1", port)
    free = int(refused.value.hint.split()[-1])
    assert free != port
    check_port("127.0.0.1", free)
    check_port("127.0.0.1", port)  # its listener is gone


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.1:8000"):
        check_port("203.0.113.1", 8000)


def test_free_ports_differ_and_are_not_the_kernels_to_give() -> None:
    """Ray, started in the meantime, was given the port that `moray serve` had chosen."""
    chosen = free_ports(50)
    assert len(set(chosen)) == 50
    assert all(map(is_free, chosen))
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not any(first <= port <= last for port in chosen)


@pytest.mark.parametrize("text", ["1024 65535", "nothing known"])
def test_other_machines_have_free_ports_too(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "range"
    setting.write_text(text)
    monkeypatch.setattr(ports, "_EPHEMERAL_RANGE", setting)
    assert all(map(is_free, free_ports(5)))
    assert is_free(free_port())
