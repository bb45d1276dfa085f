"""What the replicas of deployments report: the last event of each, from `deployments/NAME/events/`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.platform.control.deployment_rules import Answers
from moray.platform.control.deployments import Deployment, Version
from moray.platform.core.events import ServingEvent, parse_event
from moray.platform.core.home import Home
from moray.platform.store.paths import StorePath, any_path
from moray.platform.store.segments import SegmentReader

FOLDER = "deployments"
_TAIL = 64 << 10  # bytes of a segment's end that contain its last event
_NOW_SECONDS = 10.0  # age of an event whose rates still count
_CLOCKS_SECONDS = 1.0  # by which the clocks of two hosts may differ
_BRING_SECONDS = 5.0  # between readings of a store


@dataclass
class _Segment:
    """The last event of a segment, and the size of the segment when it was read."""

    size: int = -1
    event: ServingEvent | None = None


class ServingReports:
    """The reports of the replicas of one cluster. store: where replicas write them, if not on this machine."""

    def __init__(self, home: Home, store: str) -> None:
        self._home, self._store = home, store
        self._segments: dict[Path, _Segment] = {}
        self._readers: dict[str, SegmentReader] = {}
        self._due: dict[str, float] = {}

    @property
    def base(self) -> str:
        """The folder below which replicas write, for orders."""
        return f"{self._store or self._home.root}/{FOLDER}"

    def bring(self, name: str) -> None:
        """Downloads what the replicas of a deployment have written to a store. Raises InputError."""
        place = any_path(f"{self.base}/{name}")
        if isinstance(place, StorePath) and time.monotonic() >= self._due.get(name, 0.0):
            reader = self._readers.setdefault(name, SegmentReader(place, self._local(name)))
            reader.poll()
            self._due[name] = time.monotonic() + _BRING_SECONDS

    def events(self, deployment: Deployment) -> list[ServingEvent]:
        """The last event of every replica that a deployment has had, without those of an earlier one of its name."""
        folder = self._local(deployment.name) / "events"
        found = [event for path in sorted(folder.glob("*.jsonl")) if (event := self._last(path))]
        begin = deployment.created - _CLOCKS_SECONDS
        last = {event.replica: event for event in sorted(found, key=lambda event: event.time)}  # one may have two files
        return [event for event in last.values() if event.time - event.seconds >= begin]

    def answers(self, deployment: Deployment, version: Version) -> Answers:
        """The requests that a version has answered since it became live, by those of its replicas that have reported
        since then. (Replicas of an earlier life of the version have ended before.)"""
        begin = version.since - _CLOCKS_SECONDS
        mine = [e for e in self.events(deployment) if e.version == str(version.number) and e.time >= begin]
        return Answers(sum(event.requests for event in mine), sum(event.failed for event in mine))

    def _local(self, name: str) -> Path:
        place = any_path(f"{self.base}/{name}")
        return place if isinstance(place, Path) else self._home.root / FOLDER / name

    def _last(self, path: Path) -> ServingEvent | None:
        """The last complete event of a segment; the one before, if that cannot be read."""
        known = self._segments.setdefault(path, _Segment())
        try:
            size = path.stat().st_size
            if size != known.size:
                with path.open("rb") as file:
                    file.seek(max(0, size - _TAIL), os.SEEK_SET)
                    lines = file.read().rpartition(b"\n")[0].splitlines()
                known.size = size
                event = parse_event(lines[-1]) if lines else None
                known.event = event if isinstance(event, ServingEvent) else known.event
        except (OSError, ValueError):  # removed, or written by another version of Moray
            pass
        return known.event


def summary(events: Iterable[ServingEvent], now: float) -> Mapping[str, Any]:
    """Totals over all replicas, and what those that reported a moment ago do now, as JSON.

    first_token: seconds, [median, 95th percentile] of the last minute, the worst over replicas. expert_load: by MoE
    layer, the mean over replicas.
    """
    known = list(events)
    fresh = [event for event in known if now - event.time <= _NOW_SECONDS]
    times = [event.first_token for event in fresh if event.first_token]
    loads = [event.expert_load for event in fresh if any(event.expert_load)]
    return {
        **{name: sum(getattr(event, name) for event in known) for name in _TOTALS},
        "running": sum(event.running for event in fresh),
        "waiting": sum(event.waiting for event in fresh),
        "tokens_per_second": round(sum(event.tokens_per_second for event in fresh), 1),
        "cache": max((event.cache for event in fresh), default=0.0),
        "first_token": [max(one[0] for one in times), max(one[1] for one in times)] if times else None,
        "expert_load": [round(sum(layer) / len(layer), 3) for layer in zip(*loads, strict=False)],
        "by_version": _by_version(known),
    }


_TOTALS = ("requests", "failed", "cancelled", "refused", "prompt_tokens", "completion_tokens")


def _by_version(events: Iterable[ServingEvent]) -> list[dict[str, Any]]:
    """Totals of each version."""
    totals: dict[int, dict[str, Any]] = {}
    for event in events:
        number = int(event.version or 0)
        row = totals.setdefault(number, {"version": number, "reference": event.reference})
        for name in _TOTALS:
            row[name] = row.get(name, 0) + getattr(event, name)
    return [totals[number] for number in sorted(totals)]
