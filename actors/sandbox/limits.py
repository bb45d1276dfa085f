"""A program in the sandbox, seen from outside: what it says and what it holds, until it ends or meets a limit."""

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

_CELL = Path(__file__).with_name("jail.py")
_LOOK = 0.05  # seconds between two looks at what the processes hold


class SandboxRefused(MorayError):
    """This system lets no program be shut in, and the unsafe form was not asked for."""

    exit_code = 1


@dataclass(frozen=True)
class SandboxLimits:
    """Seconds by the clock and of CPU; bytes of each process's address space, which is also the bound of what all hold
    together; processes and threads; bytes of a file, of all files, of output."""

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
    """What the runner saw: exit code (minus the signal, as subprocess has it), the report, what it broke."""

    exit_code: int = 0
    report: str = ""
    output: str = ""
    broke: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_processes: int = 0


def descendants(pid: int) -> list[int]:
    """Children, then theirs, and so on, of a process of this machine that may end meanwhile."""
    found, look = [], [pid]
    while look:
        parent = look.pop(0)
        children: list[int] = []
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                    children += map(int, file.read().split())
        found += children
        look += children
    return found


def _held(pid: int) -> int:
    """Bytes of memory that are a process's own, not of a file: what is shared by a fork counts for both."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        lines = [line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(int(line[1]) << 10 for line in lines)
    return 0


class SandboxWatch:
    """One run of `jail.py`."""

    def __init__(self, limits: SandboxLimits, unsafe: bool) -> None:
        self.limits = limits
        self.unsafe = unsafe
        self.ended = Ended()

    def over(self, request: bytes, python: str) -> Ended:
        """Runs a request to its end. Raises SandboxRefused if the cell could not be built."""
        reader, writer = os.pipe()
        output, output_end = os.pipe()
        try:
            process = subprocess.Popen(
                [python, "-I", "-S", str(_CELL), str(writer)],
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
            status, said = self._follow(process, request, reader, output)
        finally:
            self._end(process)
            os.close(reader)
            os.close(output)
        self.ended.seconds = time.monotonic() - started
        return self._read(status, said)

    def _follow(
        self, process: subprocess.Popen[bytes], request: bytes, reader: int, output: int
    ) -> tuple[bytes, bytes]:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of stands in its output
            process.stdin.write(request)
            process.stdin.flush()
        deadline = time.monotonic() + self.limits.seconds
        kept = {reader: bytearray(), output: bytearray()}
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            selector.register(output, selectors.EVENT_READ)
            while selector.get_map() and not self.ended.broke:
                for key, _ in selector.select(_LOOK):
                    data = os.read(key.fd, 1 << 16)
                    kept[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
                self._measure(process.pid)
                if len(kept[output]) > self.limits.output_bytes:
                    self.ended.broke = "output"
                elif time.monotonic() > deadline and not kept[reader] and not self.ended.broke:
                    crowded = self.ended.peak_processes >= self.limits.processes
                    self.ended.broke = "processes" if crowded else "time"
        return bytes(kept[reader]), bytes(kept[output][: self.limits.output_bytes])

    def _measure(self, pid: int) -> None:
        own = descendants(pid)[1:]  # the first is the cell's
        held = sum(map(_held, own))
        self.ended.peak_bytes = max(self.ended.peak_bytes, held)
        self.ended.peak_processes = max(self.ended.peak_processes, len(own))
        if len(own) > self.limits.processes:
            self.ended.broke = "processes"
        elif held > self.limits.memory_bytes:
            self.ended.broke = "memory"

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Closes the lifeline, with which the namespace ends. In the unsafe form whatever the program started is killed
        before: while the cell lives, no process can get away from under it."""
        assert process.stdin is not None
        while self.unsafe and (own := descendants(process.pid)[1:]):
            # A group is killed in one step, in which none of it can fork; one by one, a fork bomb is faster.
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
            time.sleep(0.001)  # the cell reaps
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()

    def _read(self, status: bytes, said: bytes) -> Ended:
        self.ended.output = said.decode(errors="replace")
        if self.ended.broke:
            return self.ended
        if not status:
            raise SandboxRefused(f"the sandbox ended without a word: {self.ended.output[-300:]}")
        told: dict[str, Any] = json.loads(status)
        if "refused" in told:
            raise SandboxRefused(told["refused"])
        self.ended.exit_code, self.ended.report = told["status"], told["report"]
        return self.ended
