"""Runs the ```bash blocks of a page as a reader would, in order, each in a shell at the root of the checkout.

A line that is in NOT_RUN is left out, for the reason that stands there. A block that is one command of LASTING runs in
the background until the next block, which may ask it something, has run; then it gets Ctrl-C.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue

from moray.platform.core.home import Home

SECONDS = 900  # for one block; a block that takes minutes hangs

# Commands that cannot run in a test, as they stand before any comment, and why.
NOT_RUN = {
    "make quickstart": "has run: what it made is what these blocks find",
    "make test": "runs in .ci/run",
    "make quicktest": "is a part of make test",
    "make check": "runs in .ci/run",
    "make docs": "runs these blocks",
    "make evidence": "takes hours",
    "make format": "changes the checkout",
    "make compat PYTHON=python3.12 TORCH=2.11.0 TRITON=3.6.0": "fetches several GB",
    ".ci/run": "runs these blocks",
}

# Commands that end by Ctrl-C: how each begins -> what it prints once it can be asked, and its exit status.
LASTING = {"moray serve": (r"^serving .* at http://", 0)}


def bash_blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def commands(block: str) -> list[str]:
    """The lines of a block that are run."""
    return [line for line in block.splitlines() if line.strip() and without_comment(line) not in NOT_RUN]


def without_comment(line: str) -> str:
    return re.split(r"\s+#\s", line, maxsplit=1)[0].strip()


def lasting(lines: list[str]) -> str | None:
    """The entry of LASTING that a block is, if it is one."""
    found = [start for line in lines for start in LASTING if line.startswith(start)]
    assert not found or len(lines) == 1, f"a command that lasts needs a block of its own: {lines}"
    return found[0] if found else None


class Background:
    """A command that lasts. `stop` ends it as a reader would."""

    def __init__(self, command: str, entry: str, environment: Mapping[str, str], folder: Path) -> None:
        self._command = command
        ready, self._status = LASTING[entry]
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self._said: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_for(re.compile(ready))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put("")

    def _wait_for(self, ready: re.Pattern[str]) -> None:
        heard: list[str] = []
        while not (heard and ready.search(heard[-1])):
            try:
                heard.append(self._said.get(timeout=SECONDS))
            except Empty:
                heard.append("")
            if not heard[-1]:
                self._process.kill()
                raise AssertionError(f"{self._command} did not come up:\n{''.join(heard)}")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            assert self._process.wait(SECONDS) == self._status, self._command
        finally:
            self._process.kill()


def run_page(page: Path, environment: Mapping[str, str], folder: Path) -> None:
    """Runs every block of a page in `folder`. Raises AssertionError with what the first one that fails said."""
    background: Background | None = None
    try:
        for block in bash_blocks(page):
            lines = commands(block)
            if entry := lasting(lines):
                assert background is None, "one lasting command at a time"
                background = Background(lines[0], entry, environment, folder)
            elif lines:
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
                    cwd=folder,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    timeout=SECONDS,
                    check=False,
                )
                assert done.returncode == 0, f"{page.name}: exit {done.returncode}\n{block}\n{done.stdout}"
                if background is not None:
                    background.stop()
                    background = None
    finally:
        if background is not None:
            background.stop()


def reader_home(known: Home, folder: Path) -> Home:
    """A home that knows what `known` does and can be changed without harm: artifacts are links, the rest copies."""
    made = Home(folder)
    unfinished = shutil.ignore_patterns(".*.lease", ".*.lock", ".*.pull-*", ".removed")
    shutil.copytree(known.artifacts, made.artifacts, copy_function=_link_or_copy, ignore=unfinished)
    for source, target in ((known.aliases, made.aliases), (known.runs, made.runs)):
        if source.exists():
            shutil.copytree(source, target)
    return made


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
