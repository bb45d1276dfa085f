"""The sandbox against programs that try to escape, or to exceed their limits."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from moray.actors.sandbox import run as sandbox
from moray.actors.sandbox.run import SandboxLimits, SandboxResult, problem_with_tests, run_tests

SHORT = SandboxLimits(seconds=20.0, cpu_seconds=1)  # far apart, so that a busy machine does not change which one is met
needs_namespaces = pytest.mark.skipif(bool(sandbox.refusal()), reason=f"no namespaces here: {sandbox.refusal()}")


def trial(code: str, tests: str = "assert True", unsafe: bool = False, limits: SandboxLimits = SHORT) -> SandboxResult:
    """As `run_tests`. Also checks that no process of the program is left."""
    token = secrets.token_hex(16)
    files = {"harness.py": sandbox._HARNESS, "program.py": textwrap.dedent(code), "tests.py": textwrap.dedent(tests)}
    result = sandbox.read_result(
        sandbox.run_program(files, ["harness.py", token, "program.py", "tests.py"], limits, unsafe), token
    )
    left = [
        process.info for process in psutil.process_iter(["pid", "cmdline"]) if token in (process.info["cmdline"] or [])
    ]
    assert not left, left
    return result


ATTACKS = {
    "an endless loop": ("while True: pass", "cpu"),
    "a long sleep": ("import time; time.sleep(60)", "time"),
    "10 GB at once": ("x = bytearray(10 << 30)", "memory"),
    "10 GB bit by bit": ("x = []\nwhile True: x.append(str(len(x)) * (1 << 20))", "memory"),
    "memory in many processes": (
        "import os, time\nfor _ in range(8):\n  if os.fork() == 0: x = bytearray(200 << 20); time.sleep(50)\n"
        "time.sleep(50)",
        "memory",
    ),
    "a fork bomb": ("import os\nwhile True: os.fork()", "processes"),
    "a fork bomb that does not give up": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "processes",
    ),
    "threads": (
        "import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=(9,)).start()",
        "processes",
    ),
    "a large file": ("open('x', 'w').write('a' * (9 << 20))", "file size"),
    "many large files": ("for i in range(5): open(str(i), 'w').write('a' * (7 << 20))", "disk"),
    "open files": ("x = [open('x', 'w') for _ in range(100)]", "open files"),
    "much output": ("while True: print('x' * 1000)", "output"),
    "a write outside": ("open('/etc/passwd', 'a').write('x')", "outside"),
    "a write into Python": ("import os; open(os.__file__, 'a').write('x')", "outside"),
    "a new file outside": ("open('/new', 'w')", "outside"),
    "a socket": ("import socket; socket.create_connection(('127.0.0.1', 80))", "network"),
    "a raw socket": ("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "network"),
    "a file in memory": ("import os; os.memfd_create('x')", "outside"),
    "another namespace": (
        "import ctypes, os\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
        "if library.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'unshare')",
        "outside",
    ),
}


@needs_namespaces
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_contained_and_named(name: str) -> None:
    code, limit = ATTACKS[name]
    limits = {
        "a long sleep": replace(SHORT, seconds=1.0),
        "a fork bomb that does not give up": replace(SHORT, seconds=1.0),
        "10 GB bit by bit": replace(SHORT, cpu_seconds=15),  # some machines take a second for 400 MB of new pages
    }
    result = trial(code, limits=limits.get(name, SHORT))
    assert result.outcome == limit, result
    assert len(result.output) <= SHORT.output_bytes
    assert result.peak_processes <= SHORT.processes + 3
    assert result.peak_bytes < 2 * SHORT.memory_bytes


@needs_namespaces
def test_a_program_sees_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the key")
    os.environ["MORAY_TEST_SECRET"] = "the key"
    result = trial(
        f"""
        import os, sys
        assert not any("SECRET" in name for name in os.environ), os.environ
        assert not os.path.exists({str(tmp_path)!r})
        assert not os.path.exists("/proc") and not os.path.exists("/etc/passwd")
        assert sorted(os.listdir(".")) == ["harness.py", "program.py", "tests.py"], os.listdir(".")
        assert sorted(os.listdir("/dev")) == ["null", "urandom", "zero"]
        assert os.getuid() != 0 and os.getpid() < 10
        open("mine", "w").write("x")
        open("/dev/null", "w").write("x")
        for number in range(4, 64):
            try:
                os.fstat(number)
            except OSError:
                continue
            raise AssertionError(f"descriptor {{number}} is open")
        """
    )
    del os.environ["MORAY_TEST_SECRET"]
    assert result.passed, result


@needs_namespaces
def test_a_listener_outside_is_out_of_reach() -> None:
    """A listener of the host is out of reach even where the program opens no socket of its own kind."""
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"\0moray-{secrets.token_hex(8)}"
        listener.bind(name)
        listener.listen()
        result = trial(f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})")
        assert result.outcome == "failed"
        assert "ConnectionRefusedError" in result.detail


@needs_namespaces
def test_common_operations_of_programs_work() -> None:
    code = """
    import asyncio, collections, ctypes, decimal, hashlib, json, random, re
    import sqlite3, subprocess, sys, tempfile, threading
    async def later(): return 3
    assert asyncio.run(later()) == 3
    with tempfile.NamedTemporaryFile("w") as file: file.write("x")
    found = []
    thread = threading.Thread(target=lambda: found.append(1)); thread.start(); thread.join()
    assert subprocess.run([sys.executable, "-S", "-c", "print(7)"], capture_output=True).stdout == b"7\\n"
    """
    assert trial(code, "assert found == [1]").passed


CASES = {
    "asserts": ("def f(x): return x + 1", "assert f(1) == 2", True),
    "a wrong answer": ("def f(x): return x", "assert f(1) == 2", False),
    "test functions": ("def f(x): return x", "def test_f():\n    assert f(1) == 2", False),
    "unittest": (
        "def f(x): return x",
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(1), 2)",
        False,
    ),
    "no Python": ("def f(x) return x", "assert f(1) == 2", False),
    "leaves early": ("import os; os._exit(0)", "assert False", False),
    "exits": ("raise SystemExit(0)", "assert False", False),
    "forges a report": ('import os; os.write(3, b\'{"token": "1"}\'); os._exit(0)', "assert False", False),
}


@needs_namespaces
@pytest.mark.parametrize("name", CASES)
def test_passed_means_that_the_tests_ran(name: str) -> None:
    code, tests, passes = CASES[name]
    assert trial(code, tests).outcome == ("passed" if passes else "failed")


def test_tests_that_check_nothing_fail() -> None:
    assert problem_with_tests("f(1)") == "the tests have no check"
    assert "not valid Python" in problem_with_tests("assert f(1")
    assert run_tests("x = 1", "x").outcome == "failed"


@needs_namespaces
def test_detached_processes_end_too() -> None:
    code = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    """
    assert trial(code).passed


@needs_namespaces
def test_a_killed_caller_leaves_nothing(tmp_path: Path) -> None:
    token = secrets.token_hex(16)
    script = f"""
import sys
from moray.actors.sandbox.run import SandboxLimits, run_program
run_program({{"sleep.py": "import time; time.sleep(600)"}}, ["sleep.py", {token!r}], SandboxLimits(seconds=600))
"""
    caller = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})

    def asleep() -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [one for one in found if {"sleep.py", token} <= set(one.info["cmdline"] or [])]

    while not asleep():
        assert caller.poll() is None, "it ended before it ran anything"
    sleeper = asleep()[0]
    caller.kill()
    caller.wait()
    sleeper.wait(timeout=20)


FORBIDDEN = """
import sys
from moray.actors.sandbox import jail
from moray.actors.sandbox.run import SandboxLimits, SandboxRefused, run_tests
jail.forbid_calls()  # as container engines do: no unshare from here on
try:
    run_tests("x = 1", "assert x")
except SandboxRefused as error:
    print(error.message, "|", error.hint)
print(run_tests("x = 1", "assert x", unsafe=True).outcome)
print(run_tests("while True: pass", "assert x", SandboxLimits(seconds=20, cpu_seconds=1), unsafe=True).outcome)
"""


def test_without_namespaces_it_refuses_unless_unsafe(tmp_path: Path) -> None:
    there = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", FORBIDDEN], env=there, capture_output=True, text=True, check=True)
    refused, passed, stopped = done.stdout.splitlines()
    assert "no sandbox on this system" in refused
    assert "unsafe_sandbox: true" in refused
    assert (passed, stopped) == ("passed", "cpu"), done


@pytest.mark.parametrize(
    "name", ["an endless loop", "10 GB at once", "a fork bomb", "memory in many processes", "a large file", "a socket"]
)
def test_the_unsafe_mode_keeps_its_limits(name: str) -> None:
    code, limit = ATTACKS[name]
    assert trial(code, unsafe=True).outcome == limit
