"""How many requests each client may have open, as replicas have shown by refusing more.

A refusal by the proxy takes a tenth of the time of one by a replica. The proxy does not know the limits, because they
depend on the number of replicas and on other proxies. So it remembers how many requests a client had open when a
replica refused one. After a second it tries one more, and then more and more, until one is refused again. When half of
them have ended, the limit is forgotten: a queue counts answers, of which each request may have several.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

_DOUBLING_SECONDS = 1.0  # of the number that is tried beyond a limit
_MOST_DOUBLINGS = 64.0


@dataclass
class _Client:
    """limit: of open requests, learned at `time`; infinite until one is refused."""

    open: int = 0
    limit: float = math.inf
    time: float = 0.0


class KnownLimits:
    """Of all clients with open requests. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._clients: dict[Hashable, _Client] = {}

    def enter(self, client: Hashable) -> bool:
        """Counts a request as open until `leave`, and returns True; or False if one more would be refused."""
        one = self._clients.setdefault(client, _Client())
        doublings = min((self._clock() - one.time) / _DOUBLING_SECONDS, _MOST_DOUBLINGS)
        if one.open + 1 > one.limit + 2**doublings - 1:
            return False
        one.open += 1
        return True

    def leave(self, client: Hashable, refused: bool) -> None:
        """refused: whether a replica had no room for the request."""
        one = self._clients[client]
        one.open -= 1
        if refused:
            one.limit, one.time = float(one.open), self._clock()
        elif one.open <= one.limit / 2 < math.inf:
            one.limit = math.inf
        if not one.open:
            del self._clients[client]
