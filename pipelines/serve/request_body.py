"""Reading of request bodies in the gateway, within the limits of the models that are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from starlette.types import Receive

from moray.pipelines.serve.api_error import ApiError

LEAST_LIMIT = 1 << 20  # bytes that every model accepts
MOST = 16 << 20  # bytes, if no model says what it accepts
LIMIT = "max_body_bytes"  # of a model's card: what its replicas accept
MOST_HELD = 256 << 20  # bytes of all bodies that a proxy holds
_UNCOUNTED = 64 << 10  # bytes of each body that are always held, so that large bodies do not lock out small ones
_SILENT_SECONDS = 10.0  # between parts of a body
_WHOLE_SECONDS = 60.0  # for a whole body, and for each further `_LEAST_RATE` bytes of it a second more
_LEAST_RATE = 1 << 20
_DRAINED = 128 << 20  # bytes of a too large body that are read and discarded, so that its sender receives the response


class BodyMemory:
    """The memory for all bodies that a proxy holds, until their responses have ended."""

    def __init__(self, most: int = MOST_HELD) -> None:
        self._most, self.used = most, 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes bytes, and raises ApiError if there are not so many left. They are given back at
        the end of the block. The first `_UNCOUNTED` bytes are always there."""
        size = taken = 0

        def take(count: int) -> None:
            nonlocal size, taken
            size += count
            count = max(0, size - _UNCOUNTED) - taken
            if self.used + count > self._most:
                raise ApiError(503, "the server holds too many large requests; try later")
            self.used += count
            taken += count

        try:
            yield take
        finally:
            self.used -= taken


async def read_body(receive: Receive, limit: Callable[[], Awaitable[int]], take: Callable[[int], None]) -> bytes | None:
    """The body of a request; None if the client is gone. Raises ApiError if it is too large, or comes too slowly. No
    more is held.

    limit: the bytes of the largest body that a model accepts; called for bodies of more than `LEAST_LIMIT`. take: of
    `BodyMemory`.
    """
    parts, size, most, asked, more = [], 0, LEAST_LIMIT, False, True
    began = time.monotonic()
    while more and size <= most + _DRAINED:
        left = began + _WHOLE_SECONDS + size / _LEAST_RATE - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, min(_SILENT_SECONDS, left)))
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="request_timeout") from None
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size > most and not asked:
            most, asked = await limit(), True
        if size <= most:
            take(len(message.get("body", b"")))
            parts.append(message.get("body", b""))
        else:
            parts.clear()
        more = message.get("more_body", False)
    if size > most:
        raise ApiError(413, f"the body exceeds {most:,} bytes, the limit for requests to this server's models")
    return b"".join(parts)
