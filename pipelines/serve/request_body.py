"""Reading of request bodies in the gateway, within the limits of the models that are served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from starlette.types import Receive

from moray.pipelines.serve.api_error import ApiError

LEAST_LIMIT = 1 << 20  # bytes that every model accepts
MOST = 16 << 20  # bytes, if no model says what it accepts
LIMIT = "max_body_bytes"  # of a model's card: what its replicas accept
MOST_HELD = 256 << 20  # bytes of all bodies that a proxy holds
_DRAINED = 128 << 20  # bytes of a too large body that are read and discarded, so that its sender receives the response


class BodyMemory:
    """The memory for all bodies that a proxy holds, until their responses have ended."""

    def __init__(self, most: int = MOST_HELD) -> None:
        self._most, self.used = most, 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes bytes, and raises ApiError if there are not so many left. They are given back at
        the end of the block."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self.used + count > self._most:
                raise ApiError(503, "the server holds too many large requests; try later")
            self.used += count
            taken += count

        try:
            yield take
        finally:
            self.used -= taken


async def read_body(receive: Receive, limit: Callable[[], Awaitable[int]], take: Callable[[int], None]) -> bytes | None:
    """The body of a request; None if the client is gone. Raises ApiError if it is too large. No more is held.

    limit: the bytes of the largest body that a model accepts; called for bodies of more than `LEAST_LIMIT`. take: of
    `BodyMemory`.
    """
    parts, size, most, asked, more = [], 0, LEAST_LIMIT, False, True
    while more and size <= most + _DRAINED:
        message = await receive()
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
