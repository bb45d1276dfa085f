"""A lease in the store, for processes on different hosts: one holds it, others wait. It needs no common clock.

    <place>/lease-00000001.json    the holder; its heartbeat replaces the object, so that its ETag changes

The holder is the object with the highest number. A process that has observed the same ETag for STALE_SECONDS of its own
monotonic clock takes the lease over: it creates the object with the next number, which succeeds for one process only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from moray.platform.core.errors import InputError
from moray.platform.store.lease import Waitable
from moray.platform.store.paths import StorePath, store_variables

HEARTBEAT_SECONDS = 3.0
STALE_SECONDS = 20.0
_BEAT_TIMEOUT = 5.0  # seconds
_LONGEST_GAP = 5.0  # between two observations; after a longer one, the store or this process was away
_PREFIX = "lease-"


class StoreLease(Waitable):
    """A lease, held from a successful `acquire` to `release`; a thread updates its heartbeat. Errors of the store are
    InputErrors, except in the heartbeat: an outage that is shorter than STALE_SECONDS does no harm."""

    def __init__(self, place: StorePath, run: str = "") -> None:
        """run: the attempt `JOB.NUMBER` that this process is. It takes over the lease of an earlier attempt of its job
        at once, because an attempt is only started when the earlier ones have ended."""
        self._bucket, self._place, self._run = place.bucket, place.key, run
        self._root = place.root
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._number = 0
        self._watch = LeaseWatch(place)

    def acquire(self) -> bool:
        number = self._watch.number()
        if number and not self._watch.is_stale() and not self._is_of_earlier_attempt(number):
            return False
        token = secrets.token_hex(8)
        self._number = number + 1
        if not self._bucket.create(self._key(), self._body(token)) and self._token() != token:
            return False
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, args=[token], name="lease heartbeat", daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(InputError):  # it becomes stale
            objects = self._bucket.objects(f"{self._place}/{_PREFIX}")
            self._bucket.delete(sorted(item.key for item in objects if item.key <= self._key()))

    def holder(self) -> dict[str, Any]:
        """Returns the holder's host and pid, for messages; empty if there is none."""
        self._number = self._watch.number()
        return self._read()

    def _beat(self, token: str) -> None:
        from moray.platform.store.bucket import Bucket

        # A connection of its own, on which no beat waits longer than until the next ones.
        bucket = Bucket(self._root, _BEAT_TIMEOUT, store_variables(self._root), is_known=True, patience=0.0)
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(InputError, OSError):  # the next beat tries again
                bucket.put(self._key(), self._body(token))

    def _is_of_earlier_attempt(self, number: int) -> bool:
        self._number = number
        other = str(self._read().get("run", ""))
        job, dot, own = self._run.rpartition(".")
        other_job, _, earlier = other.rpartition(".")
        return bool(dot) and job == other_job and earlier.isdigit() and own.isdigit() and int(earlier) < int(own)

    def _body(self, token: str) -> bytes:
        """The holder, with a value that differs at every beat, so that the ETag does too."""
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "run": self._run, "token": token}
        return json.dumps({**holder, "beat": secrets.token_hex(4)}).encode()

    def _token(self) -> str:
        return str(self._read().get("token", ""))

    def _read(self) -> dict[str, Any]:
        found = json.loads(self._bucket.get(self._key()) or b"{}")
        return found if isinstance(found, dict) else {}

    def _key(self) -> str:
        return f"{self._place}/{_PREFIX}{self._number:08d}.json"


class LeaseWatch:
    """Observes a lease from outside. Its judgement needs observations over STALE_SECONDS. The time of an outage, in
    which neither heartbeats nor observations succeed, does not count."""

    def __init__(self, place: StorePath) -> None:
        self._bucket, self._place = place.bucket, place.key
        self._seen = ("", "")  # key and ETag of the newest object
        self._last = time.monotonic()  # of the last observation
        self._unchanged = 0.0  # observed seconds without a heartbeat

    def number(self) -> int:
        """Observes the lease. Returns its number; 0 if nobody holds it."""
        newest = max(self._bucket.objects(f"{self._place}/{_PREFIX}"), key=lambda item: item.key, default=None)
        seen, now = (newest.key, newest.etag) if newest else ("", ""), time.monotonic()
        self._unchanged = self._unchanged + min(now - self._last, _LONGEST_GAP) if seen == self._seen else 0.0
        self._seen, self._last = seen, now
        return int(seen[0].rpartition(_PREFIX)[2].removesuffix(".json")) if seen[0] else 0

    def is_stale(self) -> bool:
        """Whether the holder showed no sign of life in STALE_SECONDS of observation."""
        return self._unchanged > STALE_SECONDS
