"""The main text of pages, found by resiliparse in a process of its own, whose time and memory for one page are bounded.

What its parser does with a page that is made badly, or to harm, can take the square of the page's size, and nothing in
the same process can stop it. A child can be stopped: a timer of CPU time ends it, and its memory has a limit. It is
started once and asked page after page; who outlives a page answers the next. Texts travel by pipes, with their length
before them.

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

SECONDS, SECONDS_A_MB = 2.0, 1.0  # of CPU for a page; one that is well made takes a tenth of a second a MB
MEMORY = 1 << 30  # bytes beside what the child has before it reads a page; 17 MB of well made HTML take 400 MB
_IDLE = 20  # times its CPU time that a child may take by the clock: machines are busy, and processes can be stopped
# Characters and tags that are read here: the worst that is known of both takes half a second and 100 MB.
_SMALL, _FEW = 32_000, 1000
_ASKED = struct.Struct("<qd")  # bytes of the page, seconds of CPU that it may take
_LENGTH = struct.Struct("<q")
_FAILED = -1  # instead of a length: this page is given up, the child lives


class TooMuch(Exception):
    """A page took more than its time or memory, or made the parser crash."""


class Extractor:
    """A child that finds main texts, started when it is first asked, and again after a page that ended it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def main_text(self, html: str) -> str:
        """Raises TooMuch."""
        with self._lock:
            child = self._running()
            try:
                return _ask(child, html.encode(), allowance(len(html)))
            except (OSError, EOFError) as error:
                self.close()
                raise TooMuch(_how(child)) from error
            except BaseException:  # an answer that nobody took would be taken for the next page's
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


def allowance(characters: int) -> float:
    """Seconds of CPU for a page."""
    return SECONDS + SECONDS_A_MB * characters / 1e6


@functools.cache
def extractor() -> Extractor:
    """The one of this process."""
    made = Extractor()
    atexit.register(made.close)
    return made


def main_text(html: str) -> str:
    """The main text of a page. Raises TooMuch for one that is left out."""
    if len(html) > _SMALL or html.count("<") > _FEW:
        return extractor().main_text(html)
    try:
        return extract(html)
    except Exception as error:
        raise TooMuch(f"its parser gives up: {error}") from error


def extract(html: str) -> str:
    """The main text, in this process."""
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(html, main_content=True, alt_texts=False))


def _ask(child: subprocess.Popen[bytes], page: bytes, seconds: float) -> str:
    """OSError or EOFError if the child ends; TooMuch if it gives the page up."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(_ASKED.pack(len(page), seconds))
    child.stdin.write(page)
    child.stdin.flush()
    if not select.select([child.stdout], [], [], _IDLE * seconds + 60)[0]:
        child.kill()
    size = _LENGTH.unpack(_exactly(child.stdout, _LENGTH.size))[0]
    if size == _FAILED:
        raise TooMuch(_exactly(child.stdout, _LENGTH.unpack(_exactly(child.stdout, _LENGTH.size))[0]).decode())
    return _exactly(child.stdout, size).decode()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _how(child: subprocess.Popen[bytes]) -> str:
    """What a child that is gone died of."""
    code = child.wait()
    if code == -signal.SIGPROF:
        return "finding its text takes more time than a page may have"
    name = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"finding its text takes more memory or time than a page may have ({name})"


def main() -> None:
    pages, texts = sys.stdin.buffer, sys.stdout.buffer
    extract("<p>so that everything that is loaded is loaded")
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it, by closing its input
    while len(head := pages.read(_ASKED.size)) == _ASKED.size:
        size, seconds = _ASKED.unpack(head)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer, prefix = extract(pages.read(size).decode()).encode(errors="replace"), b""
        except Exception as error:
            answer, prefix = f"its parser gives up: {error}"[:200].encode(), _LENGTH.pack(_FAILED)
        signal.setitimer(signal.ITIMER_PROF, 0)
        texts.write(prefix + _LENGTH.pack(len(answer)))
        texts.write(answer)
        texts.flush()


if __name__ == "__main__":
    main()
