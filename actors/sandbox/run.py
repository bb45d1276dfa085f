"""Runs generated Python in a sandbox: no network, an in-memory folder, limits on time, memory, processes and files.

`run_tests` runs a program and its tests in a fresh interpreter inside namespaces (created by `jail.py`), and returns a
SandboxResult with the outcome, which names the limit if the program exceeded one. If the system does not allow
namespaces, it raises SandboxRefused, unless the caller requests the unsafe mode. This mode only limits resources and
uses a process group: a program can read and write everything that the user can. A program shares a process with its
tests, so it could forge a passing result, but nothing else.

A program runs until the first limit that it exceeds (`limits.py`). When `run_program` returns, none of its processes is
left.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moray.actors.sandbox.jail import BOX
from moray.actors.sandbox.limits import Ended, SandboxLimits, SandboxRefused, SandboxWatch

_LIBRARIES = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# Runs the program and then its tests in one Python namespace, and writes the result to descriptor 3.
_HARNESS = """
import json, os, sys, traceback
own = os.getpid()
token, names = sys.argv[1], sys.argv[2:]
sys.argv[:] = ["program"]
scope = {"__name__": "program"}
report = {"token": token}
try:
    for name in names:
        with open(name, encoding="utf-8") as file:
            text = file.read()
        exec(compile(text, name, "exec"), scope)
    for name, value in list(scope.items()):
        if name.startswith("test") and callable(value) and not isinstance(value, type):
            value()
    if "unittest" in sys.modules:
        import unittest
        cases = [v for v in scope.values() if isinstance(v, type) and issubclass(v, unittest.TestCase)]
        suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
        result = unittest.TextTestRunner(stream=sys.stdout).run(suite)
        if not result.wasSuccessful():
            raise AssertionError("unittest: " + (result.errors + result.failures)[0][1].strip().splitlines()[-1])
except BaseException as error:
    kind = MemoryError if isinstance(error, MemoryError) else type(error)
    place = getattr(error, "filename", None)
    report = {"error": kind.__name__, "errno": getattr(error, "errno", None), "text": str(error)[:300],
              "file": place if isinstance(place, str) else None, "os": isinstance(error, OSError)}
    try:
        traceback.print_exc(file=sys.stdout)
    except BaseException:
        report["no_traceback"] = True
try:
    sys.stdout.flush()
finally:
    if os.getpid() == own:  # not a fork of it
        os.write(3, json.dumps(report).encode())
    os._exit(0 if "token" in report else 1)
"""

# The limit that an uncaught error indicates, by errno.
_BY_NUMBER = {
    errno.EAGAIN: "processes",
    errno.ENOMEM: "memory",
    errno.EFBIG: "file size",
    errno.ENOSPC: "disk",
    errno.EMFILE: "open files",
    errno.EROFS: "outside",
    errno.EACCES: "outside",
    errno.EPERM: "outside",
}
_BY_SIGNAL = {signal.SIGXCPU: "cpu", signal.SIGSYS: "network"}


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    outcome: passed, failed, or the exceeded limit: time, cpu, memory, processes, file size, disk, open files, output,
    outside (its folder), network. detail: the error. peak_bytes, peak_processes: highest measurements.
    """

    outcome: str
    detail: str = ""
    output: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_processes: int = 0

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run_tests(code: str, tests: str, limits: SandboxLimits | None = None, unsafe: bool = False) -> SandboxResult:
    """Runs `code`, then `tests` in the same namespace: bare asserts, functions test*, unittest cases.

    `passed` means that everything ran to its end without an error. Tests without checks fail. Raises SandboxRefused.
    """
    if reason := problem_with_tests(tests):
        return SandboxResult("failed", reason)
    token = secrets.token_hex(16)
    files = {"harness.py": _HARNESS, "program.py": code, "tests.py": tests}
    ended = run_program(files, ["harness.py", token, "program.py", "tests.py"], limits, unsafe)
    return read_result(ended, token)


def problem_with_tests(tests: str) -> str:
    """The problem with tests that do not parse or have no check; '' if there is none."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the tests are not valid Python: {error}"
    checks = (ast.Assert, ast.Raise)
    if any(isinstance(node, checks) or _is_unittest_check(node) for node in ast.walk(tree)):
        return ""
    return "the tests have no check"


def _is_unittest_check(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert")


def read_result(ended: Ended, token: str) -> SandboxResult:
    """The result of a program from the report of a harness with this token."""
    try:
        report = json.loads(ended.report)
    except ValueError:
        report = {}
    outcome, detail = _outcome(ended, report if isinstance(report, dict) else {}, token)
    return SandboxResult(outcome, detail, ended.output, ended.seconds, ended.peak_bytes, ended.peak_processes)


def _outcome(ended: Ended, report: Mapping[str, Any], token: str) -> tuple[str, str]:
    if ended.exceeded:
        return ended.exceeded, f"ended after {ended.seconds:.2f} s"
    if report.get("token") == token and ended.exit_code == 0:
        return "passed", ""
    if "error" in report:
        text = f"{report['error']}: {report.get('text', '')}"
        return _limit_of(report) or "failed", text
    if ended.exit_code < 0:
        number = -ended.exit_code
        return _BY_SIGNAL.get(signal.Signals(number), "failed"), f"ended by {signal.Signals(number).name}"
    return "failed", f"exited with code {ended.exit_code} before its tests had run"


def _limit_of(report: Mapping[str, Any]) -> str:
    if report["error"] == "MemoryError":
        return "memory"
    if report["error"] == "RuntimeError" and "new thread" in str(report.get("text")):
        return "processes"
    if not report.get("os"):
        return ""
    path = str(report.get("file") or "")
    if report.get("errno") == errno.ENOENT and path.startswith("/") and not path.startswith(BOX + "/"):
        return "outside"
    return _BY_NUMBER.get(report.get("errno") or 0, "")


@functools.cache
def refusal() -> str:
    """The reason why this system does not allow the sandbox; '' if it does. Tested by a trial run, once per process."""
    try:
        ended = _run({"harness.py": "print('ready')"}, ["harness.py"], SandboxLimits(), False, ())
    except SandboxRefused as error:
        return error.message
    return "" if ended.output == "ready\n" else f"a trial run printed {ended.output!r} and reported {ended.report!r}"


def run_program(
    files: Mapping[str, str],
    arguments: Sequence[str],
    limits: SandboxLimits | None = None,
    unsafe: bool = False,
    readable: Sequence[str] = (),
) -> Ended:
    """Runs `python *arguments` in a folder with `files` (name -> text). Environment and standard input are empty.

    readable: package folders that the program may import, the only files of the caller that it can see. Raises
    SandboxRefused.
    """
    if not unsafe and (reason := refusal()):
        raise SandboxRefused(
            f"no sandbox on this system: {reason}",
            "run where user namespaces are allowed (sysctl user.max_user_namespaces; docker: --cap-add SYS_ADMIN or"
            " --security-opt seccomp=unconfined), or set unsafe_sandbox: true in the recipe and accept the risk",
        )
    return _run(files, arguments, limits or SandboxLimits(), unsafe, readable)


def _run(
    files: Mapping[str, str], arguments: Sequence[str], limits: SandboxLimits, unsafe: bool, readable: Sequence[str]
) -> Ended:
    with contextlib.ExitStack() as stack:
        python = os.path.realpath(sys.executable)
        script = ["-I", "-S", "-B", "-X", "utf8"]
        if readable:  # adds the package folders to sys.path
            start = (
                f"import runpy, sys; sys.path += {list(readable)!r}; sys.argv.pop(0);"
                "runpy.run_path(sys.argv[0], run_name='__main__')"
            )
            script += ["-c", start]
        request = {
            "isolate": not unsafe,
            "files": dict(files),
            "argv": [python, *script, *arguments],
            "limits": {key: value for key, value in asdict(limits).items() if key != "seconds"},
            "folders": [*_LIBRARIES, python, f"{os.path.realpath(sys.base_prefix)}/lib", *readable],
            "devices": _DEVICES,
            "folder": stack.enter_context(tempfile.TemporaryDirectory(prefix="moray-sandbox-")) if unsafe else BOX,
        }
        return SandboxWatch(limits, unsafe).run(json.dumps(request).encode() + b"\n", python)
