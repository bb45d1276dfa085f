"""Monitors a sandboxed program from outside: its output and resources, until it ends or exceeds a limit."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.platform.core.errors import MorayError

_JAIL = Path(__file__).with_name("jail.py")
_POLL_SECONDS = 0.05  # between two measurements of the processes


class SandboxRefused(MorayError):
    """The system does not allow a sandbox, and the unsafe mode was not requested."""

    exit_code = 1


@dataclass(frozen=True)
class SandboxLimits:
    """seconds: wall-clock time. memory_bytes: address space of each process, and memory of all processes together.
    processes: processes and threads. file_bytes, disk_bytes: size of one file, and of all files."""

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    processes: int = 16
    open_files: int = 64
    file_bytes: int = 8 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 64 << 10


@dataclass
class Ended:
    """How a program ended. exit_code: negative for a signal, as in subprocess. exceeded: the limit that it exceeded."""

    exit_code: int = 0
    report: str = ""
    output: str = ""
    exceeded: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_processes: int = 0


def descendants(pid: int) -> list[int]:
    """All descendants of a process, which may end meanwhile."""
    found, queue = [], [pid]
    while queue:
        parent = queue.pop(0)
        children: list[int] = []
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                    children += map(int, file.read().split())
        found += children
        queue += children
    return found


def _memory(pid: int) -> int:
    """Bytes of a process's memory that are not file-backed. Pages shared after a fork count for both processes."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        lines = [line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(int(line[1]) << 10 for line in lines)
    return 0


class SandboxWatch:
    """Monitors one run of `jail.py`."""

    def __init__(self, limits: SandboxLimits, unsafe: bool) -> None:
        self.limits = limits
        self.unsafe = unsafe
        self.ended = Ended()

    def run(self, request: bytes, python: str) -> Ended:
        """Runs a request to its end. Raises SandboxRefused if the sandbox could not be created."""
        reader, writer = os.pipe()
        output, output_end = os.pipe()
        try:
            process = subprocess.Popen(
                [python, "-I", "-S", str(_JAIL), str(writer)],
                stdin=subprocess.PIPE,
                stdout=output_end,
                stderr=output_end,
                pass_fds=[writer],
                env={},
                start_new_session=True,
            )
        finally:
            os.close(writer)
            os.close(output_end)
        started = time.monotonic()
        try:
            status, printed = self._follow(process, request, reader, output)
        finally:
            self._end(process)
            os.close(reader)
            os.close(output)
        self.ended.seconds = time.monotonic() - started
        return self._result(status, printed)

    def _follow(
        self, process: subprocess.Popen[bytes], request: bytes, reader: int, output: int
    ) -> tuple[bytes, bytes]:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the reason of its end is in its output
            process.stdin.write(request)
            process.stdin.flush()
        deadline = time.monotonic() + self.limits.seconds
        kept = {reader: bytearray(), output: bytearray()}
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            selector.register(output, selectors.EVENT_READ)
            while selector.get_map() and not self.ended.exceeded:
                for key, _ in selector.select(_POLL_SECONDS):
                    data = os.read(key.fd, 1 << 16)
                    kept[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
                self._measure(process.pid)
                if len(kept[output]) > self.limits.output_bytes:
                    self.ended.exceeded = "output"
                elif time.monotonic() > deadline and not kept[reader] and not self.ended.exceeded:
                    crowded = self.ended.peak_processes >= self.limits.processes
                    self.ended.exceeded = "processes" if crowded else "time"
        return bytes(kept[reader]), bytes(kept[output][: self.limits.output_bytes])

    def _measure(self, pid: int) -> None:
        own = descendants(pid)[1:]  # the first is part of the sandbox
        used = sum(map(_memory, own))
        self.ended.peak_bytes = max(self.ended.peak_bytes, used)
        self.ended.peak_processes = max(self.ended.peak_processes, len(own))
        if len(own) > self.limits.processes:
            self.ended.exceeded = "processes"
        elif used > self.limits.memory_bytes:
            self.ended.exceeded = "memory"

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Closes the lifeline, which ends the namespace. In unsafe mode, first kills all processes of the program. They
        cannot leave the process tree of `jail.py` while it runs."""
        assert process.stdin is not None
        while self.unsafe and (own := descendants(process.pid)[1:]):
            # A group is killed atomically, so none of its processes can fork. A fork bomb outruns kills one by one.
            groups = set()
            for pid in own:
                with contextlib.suppress(ProcessLookupError):
                    groups.add(os.getpgid(pid))
            for group in groups - {process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            for pid in own:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)  # lets jail.py reap them
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()

    def _result(self, status: bytes, printed: bytes) -> Ended:
        self.ended.output = printed.decode(errors="replace")
        if self.ended.exceeded:
            return self.ended
        if not status:
            raise SandboxRefused(f"the sandbox ended without a status: {self.ended.output[-300:]}")
        result: dict[str, Any] = json.loads(status)
        if "refused" in result:
            raise SandboxRefused(result["refused"])
        self.ended.exit_code, self.ended.report = result["status"], result["report"]
        return self.ended
