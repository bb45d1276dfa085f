"""Extracts the main text of pages with resiliparse, in a child process whose time and memory per page are bounded.

On malformed or hostile pages, the parser can take time quadratic in the page's size, and nothing in the same process
can stop it. A CPU timer and a memory limit can stop a child process. The child is started once and processes one page
after another, and is restarted only after a page that killed it. Pages and texts are sent through pipes, each preceded
by its length.

    python -m moray.pipelines.corpus.extractor_process      reads pages and writes texts until its input ends
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from typing import IO

SECONDS, SECONDS_PER_MB = 2.0, 1.0  # CPU limit of a page; a well-formed page takes 0.1 s per MB
MEMORY = 1 << 30  # bytes beyond the child's initial memory; 17 MB of well-formed HTML take 400 MB
_IDLE = 20  # ratio of the wall-clock limit to the CPU limit: machines are busy, and processes can be suspended
# Pages with at most this many characters and tags are parsed in this process: the worst known take 0.5 s and 100 MB.
_SMALL_PAGE, _FEW_TAGS = 32_000, 1000
_REQUEST = struct.Struct("<qd")  # bytes of the page, CPU limit in seconds
_LENGTH = struct.Struct("<q")
_FAILED = -1  # in place of a length: extraction failed, but the child is alive


class ExtractionFailed(Exception):
    """A page exceeded its time or memory limit, or made the parser fail."""


class Extractor:
    """A child process that extracts main texts. It starts on first use, and again after a page that killed it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def main_text(self, html: str) -> str:
        """The main text of a page. Raises ExtractionFailed."""
        with self._lock:
            child = self._running()
            try:
                return _extract_in(child, html.encode(), cpu_limit(len(html)))
            except (OSError, EOFError) as error:
                self.close()
                raise ExtractionFailed(_cause_of_death(child)) from error
            except BaseException:  # an unread answer would be taken for that of the next page
                self.close()
                raise

    def close(self) -> None:
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        self._child = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-m", "moray.pipelines.corpus.extractor_process"]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._owner = os.getpid()
        return self._child


def cpu_limit(characters: int) -> float:
    """Seconds of CPU time allowed for a page."""
    return SECONDS + SECONDS_PER_MB * characters / 1e6


@functools.cache
def extractor() -> Extractor:
    """The extractor of this process."""
    made = Extractor()
    atexit.register(made.close)
    return made


def main_text(html: str) -> str:
    """The main text of a page. Raises ExtractionFailed."""
    if len(html) > _SMALL_PAGE or html.count("<") > _FEW_TAGS:
        return extractor().main_text(html)
    try:
        return extract(html)
    except Exception as error:
        raise ExtractionFailed(f"the HTML parser failed: {error}") from error


def extract(html: str) -> str:
    """The main text of a page, extracted in this process."""
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(html, main_content=True, alt_texts=False))


def _extract_in(child: subprocess.Popen[bytes], page: bytes, seconds: float) -> str:
    """Raises OSError or EOFError if the child dies, and ExtractionFailed if the parser fails."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(_REQUEST.pack(len(page), seconds))
    child.stdin.write(page)
    child.stdin.flush()
    if not select.select([child.stdout], [], [], _IDLE * seconds + 60)[0]:
        child.kill()
    size = _LENGTH.unpack(_read_exactly(child.stdout, _LENGTH.size))[0]
    if size == _FAILED:
        size = _LENGTH.unpack(_read_exactly(child.stdout, _LENGTH.size))[0]
        raise ExtractionFailed(_read_exactly(child.stdout, size).decode())
    return _read_exactly(child.stdout, size).decode()


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _cause_of_death(child: subprocess.Popen[bytes]) -> str:
    """The reason why a child ended."""
    code = child.wait()
    if code == -signal.SIGPROF:
        return "text extraction exceeded the CPU limit of a page"
    name = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"text extraction exceeded the memory or time limit of a page ({name})"


def main() -> None:
    pages, texts = sys.stdin.buffer, sys.stdout.buffer
    extract("<p>loads every library before the memory limit is set")
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing its input
    while len(head := pages.read(_REQUEST.size)) == _REQUEST.size:
        size, seconds = _REQUEST.unpack(head)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer, prefix = extract(pages.read(size).decode()).encode(errors="replace"), b""
        except Exception as error:
            answer, prefix = f"the HTML parser failed: {error}"[:200].encode(), _LENGTH.pack(_FAILED)
        signal.setitimer(signal.ITIMER_PROF, 0)
        texts.write(prefix + _LENGTH.pack(len(answer)))
        texts.write(answer)
        texts.flush()


if __name__ == "__main__":
    main()
