"""Curves and heat maps of bounded size: they are thinned while they grow, and keep their extremes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from moray.platform.core.events import MetricEvent

MOST_POINTS = 500
MOST_ROWS = 250
_DIGITS = 6  # significant digits, enough for a chart


@dataclass
class Curve:
    """(at, value) pairs. After a restart a step may be reported twice; the latest report counts."""

    _points: dict[int, tuple[float, float]] = field(default_factory=dict)  # at -> (value, time)

    def add(self, at: int, value: float, time: float) -> None:
        if at not in self._points or time >= self._points[at][1]:
            self._points[at] = (value, time)
        if len(self._points) > 4 * MOST_POINTS:
            kept = thin([(at, value) for at, (value, _) in sorted(self._points.items())], 2 * MOST_POINTS)
            self._points = {at: self._points[at] for at, _ in kept}

    def points(self) -> list[list[float | None]]:
        """At most 500 points in ascending order, values rounded to six digits."""
        thinned = thin([(at, value) for at, (value, _) in sorted(self._points.items())], MOST_POINTS)
        return [[at, short(value)] for at, value in thinned]


def thin(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most `most` of `points`: the first, the last, and the lowest and highest of each interval between them."""
    if len(points) <= most:
        return points
    inner, intervals = points[1:-1], (most - 2) // 2
    kept = {0: points[0], len(points) - 1: points[-1]}
    for i in range(intervals):
        start, stop = i * len(inner) // intervals, (i + 1) * len(inner) // intervals
        for choose in (min, max):
            place = choose(range(start, stop), key=lambda j: inner[j][1])
            kept[place + 1] = inner[place]
    return [kept[place] for place in sorted(kept)]


@dataclass
class LoadMap:
    """Expert load of every MoE layer per training step; every second step is dropped when there are too many."""

    _rows: dict[int, dict[int, float]] = field(default_factory=dict)  # at -> layer -> load
    last: float = 0.0

    def add(self, event: MetricEvent) -> None:
        layer = event.labels.get("layer", "")
        if not layer.isdigit():
            return
        if len(self._rows) >= 2 * MOST_ROWS and event.at not in self._rows:
            self._rows = {at: row for i, (at, row) in enumerate(sorted(self._rows.items())) if i % 2 == 0}
        self._rows.setdefault(event.at, {})[int(layer)] = event.value
        self.last = max(self.last, event.time)

    def as_json(self) -> dict[str, Any] | None:
        """As documented in docs/http-api.md: one row of `values` per step; null where a layer has no value."""
        steps = sorted(self._rows)
        every = -(-len(steps) // MOST_ROWS)
        if not steps:
            return None
        steps = steps[len(steps) - 1 :: -every][::-1]  # always includes the last step
        layers = sorted({layer for row in self._rows.values() for layer in row})
        values = [[short(self._rows[at].get(layer)) for layer in layers] for at in steps]
        return {"steps": steps, "layers": layers, "values": values, "what": "max/mean load"}


def short(value: float | None) -> float | None:
    """Rounds a number for JSON; NaN and infinities become null."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")
