"""Requests and tokens per minute of each key: token buckets, which all replicas of a cluster share.

A bucket holds what a minute allows and fills steadily. A request takes its prompt and the tokens that it asks for, and
gives back those that it did not generate. If it did not say how many it wants, those that it generated are taken at its
end, and the bucket may be overdrawn.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moray.pipelines.serve.shared_actor import shared_actor
from moray.platform.core.api_keys import ApiKey

_log = logging.getLogger(__name__)
_MINUTE = 60.0


@dataclass
class _Bucket:
    """left: of `size`, at `time`."""

    size: float
    left: float
    time: float

    def fill(self, size: float, now: float) -> None:
        self.left += size - self.size if size != self.size else 0.0  # the limit was changed
        self.size = size
        self.left = min(size, self.left + max(0.0, now - self.time) * size / _MINUTE)
        self.time = now

    def seconds_until(self, amount: float) -> float:
        return max(0.0, amount - self.left) * _MINUTE / self.size


@dataclass(frozen=True)
class Quota:
    """What a key may still do. wait: seconds until the request may be tried again; 0 if it was admitted, infinite if it
    is larger than the limit. short: which limit, `requests` or `tokens`. headers: of OpenAI's API."""

    wait: float = 0.0
    short: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class KeyMeter:
    """The buckets of all keys. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def take(self, key: ApiKey, tokens: int) -> Quota:
        """Takes a request of so many tokens, if all limits allow it, or else nothing."""
        limits = {name: limit for name, limit in (("requests", key.requests), ("tokens", key.tokens)) if limit}
        amounts = {"requests": 1, "tokens": tokens}
        buckets = {name: self._bucket(key, name, limit) for name, limit in limits.items()}
        waits = {
            name: math.inf if amounts[name] > bucket.size else bucket.seconds_until(amounts[name])
            for name, bucket in buckets.items()
        }
        short = max(waits, key=lambda name: waits[name], default="")
        wait = waits.get(short, 0.0)
        if not wait:
            for name, bucket in buckets.items():
                bucket.left -= amounts[name]
        headers = {}
        for name, bucket in buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(int(bucket.size))
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.left)))
            headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.size):.3f}s"
        return Quota(wait, short if wait else "", headers)

    def give(self, key: ApiKey, tokens: int) -> None:
        """Gives back tokens that a request took and did not use; takes more, if negative."""
        if key.tokens:
            bucket = self._bucket(key, "tokens", key.tokens)
            bucket.left = min(bucket.size, bucket.left + tokens)

    def _bucket(self, key: ApiKey, name: str, limit: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault((key.sha256, name), _Bucket(limit, limit, now))
        bucket.fill(limit, now)
        return bucket


class SharedMeter:
    """The meter of all replicas of this Ray cluster: an actor. Without one, or while it cannot be reached, each replica
    counts for itself."""

    def __init__(self, shared: bool) -> None:
        self._shared, self._own = shared, KeyMeter()
        self._actor: Any = None

    async def take(self, key: ApiKey, tokens: int) -> Quota:
        if not (key.requests or key.tokens):
            return Quota()
        if self._shared:
            try:
                quota: Quota = await self._reached().take.remote(key, tokens)
                return quota
            except Exception as error:
                self._lost(error)
        return self._own.take(key, tokens)

    def give(self, key: ApiKey, tokens: int) -> None:
        """Does not wait for the actor."""
        if not key.tokens or not tokens:
            return
        if self._shared:
            try:
                self._reached().give.remote(key, tokens)
                return
            except Exception as error:
                self._lost(error)
        self._own.give(key, tokens)

    def _reached(self) -> Any:
        if self._actor is None:
            self._actor = shared_actor(KeyMeter)
        return self._actor

    def _lost(self, error: Exception) -> None:
        _log.warning("limits of keys are counted by this replica alone: %s", type(error).__name__)
        self._actor = None
